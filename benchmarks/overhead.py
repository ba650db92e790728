"""What Flat-LoRA costs: time and memory of one training step beside plain LoRA and the in-place method.

    python -m benchmarks.overhead                          # all cases that this machine can run
    python -m benchmarks.overhead --case b --dtype fp32 --layers 4 --minutes 5 --output overhead.md

Every arm (plain LoRA, Flat-LoRA with either source of noise, the published in-place method) takes one full
step per repeat: forward, backward, AdamW. Arms share the frozen weights and alternate within a repeat, in an
order that rotates, so that a slow moment of the machine falls on all of them alike; ratios are taken repeat
by repeat. Memory is measured in the warm-up.

Cases: (a) the demo UNet, float32; (b) a stack of SDXL's largest transformer blocks, without and with gradient
checkpointing; (c) the whole SDXL UNet with random weights, on a GPU only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.bases import SDXL
from benchmarks.common import (
    DEMO_BASE,
    DTYPES,
    RANK,
    SIGMA,
    TARGETS,
    add_common_options,
    default_dtype,
    dtype_name,
    machine,
    now,
    positive,
    write_report,
)
from benchmarks.inplace import InPlaceFlatLoRA
from benchmarks.memory import MIB, CpuLedger, CudaLedger, Memory, sampled_between_layers
from flatlora_diffusion import FlatLoRA

# Cases: a model with LoRA, and its loss.


@dataclass
class Case:
    """Something to train: `loss(model)` is the loss of one fixed batch."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


class Stack(nn.Module):
    """Transformer blocks of SDXL's widest level, one after the other."""

    def __init__(self, layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim=1280,
                num_attention_heads=20,
                attention_head_dim=64,
                cross_attention_dim=2048,
                activation_fn="geglu",
            )
            for _ in range(layers)
        )

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """Run the blocks on hidden states (batch, tokens, 1280) and a context (batch, length, 2048)."""
        for block in self.blocks:
            if self.checkpointing:
                hidden_states = checkpoint(block, hidden_states, None, context, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, encoder_hidden_states=context)
        return hidden_states


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision as the trainer has it: half-precision base, float32 adapter."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def with_lora(model: nn.Module) -> nn.Module:
    """Freeze the model and give it a float32 LoRA; its B is not zero, as it is only before the first step."""
    model.requires_grad_(False).train()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def unet_case(name: str, unet: UNet2DConditionModel) -> Case:
    """One batch of one noisy latent for a UNet of the SDXL kind."""
    config, device, dtype = unet.config, unet.device, unet.dtype
    time_ids = torch.tensor([[8.0 * config.sample_size] * 2 + [0.0] * 2 + [8.0 * config.sample_size] * 2])
    pooled = config.projection_class_embeddings_input_dim - time_ids.numel() * config.addition_time_embed_dim
    batch = {
        "sample": torch.randn(1, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim),
    }
    batch = {key: value.to(device, dtype) for key, value in batch.items()}
    batch["timestep"] = torch.tensor([500], device=device)
    batch["added_cond_kwargs"] = {
        "text_embeds": torch.randn(1, pooled).to(device, dtype),
        "time_ids": time_ids.to(device, dtype),
    }

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, dtype):
            return model(**batch, return_dict=False)[0].float().square().mean()

    return Case(name, with_lora(unet), loss)


def demo_case(device: torch.device) -> Case:
    """(a) The demo base that the repository ships, in float32."""
    unet = UNet2DConditionModel.from_pretrained(DEMO_BASE, subfolder="unet").to(device)
    side = unet.config.sample_size
    return unet_case(f"(a) demo UNet, fp32, {device.type.upper()}, batch 1, {side} x {side} latents", unet)


def stack_case(
    layers: int, tokens: int, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> Case:
    """(b) Transformer blocks of SDXL at their real widths, batch 1."""
    stack = with_lora(Stack(layers, checkpointing).to(device, dtype))
    hidden_states = torch.randn(1, tokens, 1280).to(device, dtype)
    context = torch.randn(1, 77, 2048).to(device, dtype)

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, dtype):
            return model(hidden_states, context).float().square().mean()

    name = (
        f"(b) {layers} SDXL transformer blocks of width 1280, {dtype_name(dtype)}, {device.type.upper()}, "
        f"{tokens} tokens, gradient checkpointing {'on' if checkpointing else 'off'}"
    )
    return Case(name, stack, loss)


def sdxl_case() -> Case:
    """(c) The whole SDXL UNet on a GPU, random weights in bf16, gradient checkpointing, batch 1."""
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**SDXL.unet).to(torch.bfloat16)
    unet.enable_gradient_checkpointing()
    return unet_case("(c) SDXL UNet, bf16, GPU, batch 1, 128 x 128 latents, gradient checkpointing", unet)


# Arms: ways to take a training step.


class PlainLoRA:
    """A step of plain LoRA; the other arms add to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Forward, backward, AdamW."""
        loss(self.model).backward()
        self.update()

    def update(self) -> None:
        """AdamW on the LoRA parameters."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class Flat(PlainLoRA):
    """This project's Flat-LoRA."""

    def __init__(self, model: nn.Module, noise: str) -> None:
        super().__init__(model)
        self.flat = FlatLoRA(model, sigma=SIGMA, total_steps=1, schedule="constant", noise=noise)
        self.flat.epsilon(next(iter(self.flat.layers)))  # makes the table, once for all steps

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """A step under this step's noise; then the next noise."""
        super().train_step(loss)
        self.flat.step()


class InPlace(PlainLoRA):
    """The published method."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.noise = InPlaceFlatLoRA(model, SIGMA)

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """A step between adding the noise to the weights and subtracting it."""
        self.noise.perturb()
        loss(self.model).backward()
        self.noise.restore()
        self.update()


PLAIN = "plain LoRA"
ARMS: dict[str, Callable[[nn.Module], PlainLoRA]] = {
    PLAIN: PlainLoRA,
    "Flat-LoRA, table": lambda model: Flat(model, "table"),
    "Flat-LoRA, gaussian": lambda model: Flat(model, "gaussian"),
    "in place": InPlace,
}


# Measuring.


@dataclass
class Result:
    """What was measured in one case: seconds of every repeat and MiB beyond plain LoRA, by arm."""

    case: str
    adapted_layers: int
    largest_weight_mib: float
    all_weights_mib: float
    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, float]]


def copy_sharing_base(model: nn.Module) -> nn.Module:
    """A copy with LoRA parameters of its own and the same frozen weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen})


def measure(case: Case, deadline: float, repeats: int | None) -> Result:
    """Warm up while measuring memory, then time the arms in turn.

    Args:
        case: What to train.
        deadline: Value of `time.monotonic()` after which no repeat is begun, if two are done.
        repeats: Take exactly this many repeats instead.
    """
    device = next(case.model.parameters()).device
    # What the first pass through a model allocates for good (workspaces of libraries) is no arm's.
    case.loss(case.model).backward()
    case.model.zero_grad()

    arms: dict[str, PlainLoRA] = {}
    memory: dict[str, Memory] = {}
    for name, build in ARMS.items():
        model = copy_sharing_base(case.model)
        known = [*model.parameters(), *model.buffers()]
        memory[name] = Memory()
        with CudaLedger() if device.type == "cuda" else CpuLedger(known) as ledger:
            arms[name] = build(model)
            ledger.reset_peak()
            with sampled_between_layers(model, ledger.live, memory[name].between_layers):
                arms[name].train_step(case.loss)
            memory[name].at_rest, memory[name].peak = ledger.live(), ledger.peak()

    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    began = time.monotonic()
    for done in itertools.count():
        next_end = time.monotonic() + (time.monotonic() - began) / max(done, 1)
        if done == repeats or (repeats is None and done >= 2 and next_end > deadline):
            break
        order = list(ARMS)[done % len(ARMS) :] + list(ARMS)[: done % len(ARMS)]
        for name in order:
            start = now(device)
            arms[name].train_step(case.loss)
            seconds[name].append(now(device) - start)

    weights = [m.get_base_layer().weight for m in case.model.modules() if isinstance(m, LoraLayer)]
    sizes = [weight.nbytes / MIB for weight in weights]
    return Result(
        case=case.name,
        adapted_layers=len(weights),
        largest_weight_mib=max(sizes),
        all_weights_mib=sum(sizes),
        seconds=seconds,
        memory={name: memory[name].beyond(memory[PLAIN]) for name in ARMS},
    )


# Reporting.


def table(result: Result) -> str:
    """One case as a Markdown table."""
    lines = [
        f"### {result.case}",
        "",
        f"{len(result.seconds[PLAIN])} repeats. {result.adapted_layers} adapted weights: the largest has "
        f"{result.largest_weight_mib:.3g} MiB, all have {result.all_weights_mib:.4g} MiB.",
        "",
        "| | s / step | x plain (min-max) | adds, ms | at rest, MiB | between layers, MiB | peak, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    plain = result.seconds[PLAIN]
    for name, seconds in result.seconds.items():
        ratios = [one / other for one, other in zip(seconds, plain, strict=True)]
        added = statistics.median(one - other for one, other in zip(seconds, plain, strict=True))
        memory = result.memory[name]
        cells = [name, f"{statistics.median(seconds):.4g}"]
        if name == PLAIN:
            cells += ["1", *["-"] * 4]
        else:
            cells += [
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
                f"{1000 * added:.1f}",
                *(f"{memory[key]:.2f}" for key in ("at_rest_mib", "between_layers_mib", "peak_mib")),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results: list[Result], skipped: list[str]) -> str:
    """The whole run in Markdown."""
    head = (
        "## Cost of one training step\n\n"
        f"{machine()}.\n\n"
        f"LoRA of rank {RANK} on {', '.join(TARGETS)}; forward, backward, AdamW. Times are medians; ratios "
        "are taken repeat by repeat. Memory is what an arm holds beyond plain LoRA: after the step, at the "
        "boundary between two LoRA layers where it is largest, and at the peak of the step."
    )
    return "\n\n".join([head, *map(table, results), *skipped]) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.overhead",
    )
    parser.add_argument("--case", nargs="+", choices="abc", default=list("abc"), help="which cases (all)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the base in case b (bf16 if the device has it in hardware, else fp32)",
    )
    parser.add_argument("--layers", type=positive, default=10, help="blocks in case b (10, as in SDXL)")
    parser.add_argument(
        "--tokens", type=positive, default=1024, help="tokens in case b (1024: 1024-pixel images)"
    )
    parser.add_argument(
        "--repeats", type=positive, help="repeats of every case (as many as --minutes allows)"
    )
    parser.add_argument("--minutes", type=float, default=7, help="time for everything, about (7)")
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the cases asked for and print the report."""
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = DTYPES[options.dtype or default_dtype()]

    builds: list[Callable[[], Case]] = []
    skipped = []
    if "a" in options.case:
        if (DEMO_BASE / "unet").is_dir():
            builds.append(functools.partial(demo_case, device))
        else:
            skipped.append(f"Case (a) was left out: {DEMO_BASE.name} is not in assets.")
    if "b" in options.case:
        stack = functools.partial(stack_case, options.layers, options.tokens, dtype, device)
        builds += [functools.partial(stack, checkpointing) for checkpointing in (False, True)]
    if "c" in options.case:
        if has_gpu:
            builds.append(sdxl_case)
        else:
            skipped.append("Case (c) was left out: there is no GPU.")

    results = []
    for index, build in enumerate(builds):
        share = (end - time.monotonic()) / (len(builds) - index)
        results.append(measure(build(), time.monotonic() + share, options.repeats))
        print(table(results[-1]), end="\n\n", file=sys.stderr)  # progress: a full run takes minutes

    content = {"skipped": skipped, "results": [asdict(result) for result in results]}
    write_report(report(results, skipped), content, options.output)


if __name__ == "__main__":
    main()
