"""How the cost of Flat-LoRA grows: time and memory of a step beside plain LoRA, one setting varied at a time.

    python -m benchmarks.growth                                  # all sweeps, about 10 minutes on 2 cores
    python -m benchmarks.growth --sweep rank tokens --repeats 5 --dtype fp32 --output growth.md

Sweeps: rank; tokens (the resolution: a side of n pixels is (n / 32)^2 tokens at SDXL's deepest level; a
larger batch is the same); the layers that have a LoRA and are perturbed; gradient checkpointing; the text
encoders. Each is done on a transformer block of SDXL at its real width, between its two projections, and on
the demo base in float32. In between, all settings are the paper's: rank 4, the attention's projections, 1,024
tokens, batch 1, prompts' embeddings kept.

Plain LoRA and Flat-LoRA (table) take turns within a repeat and share the frozen weights, as in
`benchmarks.overhead`; memory is measured in the warm-up.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.bases import SDXL
from benchmarks.cases import (
    Case,
    Predict,
    Stack,
    WithTextEncoders,
    cached_prompts_case,
    demo_unet,
    predict_of_stack,
    predict_of_unet,
    text_encoders_case,
)
from benchmarks.common import (
    DEMO_BASE,
    DTYPES,
    RANK,
    SIGMA,
    TARGETS,
    add_common_options,
    benchmark_parser,
    default_dtype,
    machine,
    positive,
    write_report,
)
from benchmarks.step_arms import FLAT, PLAIN
from benchmarks.steps import Result, measure, ratio

RANKS = (1, 4, 16, 64)
TOKENS = (256, 1024, 4096)
BATCHES = (1, 4, 16)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
OTHER_LINEAR = ("proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2")
LAYERS = {
    "attention": tuple(TARGETS),
    "attention, feed-forward": (*TARGETS, *FEED_FORWARD),
    "all linear layers": (*TARGETS, *FEED_FORWARD, *OTHER_LINEAR),
}
TEXT = {
    "text encoders off": None,
    "text encoders trained, not perturbed": False,
    "text encoders trained and perturbed": True,
}


@dataclass(frozen=True)
class Setting:
    """What is measured: everything but one of these stays as it is here.

    Attributes:
        rank: Of the LoRA.
        tokens: Of the block's hidden states.
        batch: Images, on the demo base.
        targets: The layers of the UNet that have a LoRA.
        checkpointing: Whether activations are computed again in the backward pass.
        text: Whether the text encoders, trained, are perturbed; None: they are not part of the step.
    """

    rank: int = RANK
    tokens: int = 1024
    batch: int = 1
    targets: tuple[str, ...] = tuple(TARGETS)
    checkpointing: bool = False
    text: bool | None = None


@dataclass(frozen=True)
class BlockSizes:
    """SDXL's: one block of its widest level, and text encoders of its widths with a few layers each."""

    blocks: int = 1
    width: int = SDXL.unet["block_out_channels"][-1]
    # One layer more than is trained to any effect: its output is not used, as in SDXL.
    text_encoder: dict[str, Any] = field(default_factory=lambda: SDXL.text_encoder | {"num_hidden_layers": 3})
    text_encoder_2: dict[str, Any] = field(
        default_factory=lambda: SDXL.text_encoder_2 | {"num_hidden_layers": 3}
    )

    def context_width(self) -> int:
        """Width of a prompt's embeddings."""
        return self.text_encoder["hidden_size"] + self.text_encoder_2["hidden_size"]


Settings = list[tuple[str, Setting]]
"""What a sweep measures, with the names of its rows."""


def _sweep(field_name: str, values: dict[str, Any]) -> Settings:
    return [(label, replace(Setting(), **{field_name: value})) for label, value in values.items()]


COMMON: dict[str, Settings] = {
    "rank": _sweep("rank", {f"rank {rank}": rank for rank in RANKS}),
    "layers": _sweep("targets", LAYERS),
    "checkpointing": _sweep(
        "checkpointing", {"gradient checkpointing off": False, "gradient checkpointing on": True}
    ),
    "text": _sweep("text", TEXT),
}
SWEEPS: dict[str, dict[str, Settings]] = {
    "block": COMMON | {"tokens": _sweep("tokens", {f"{tokens:,} tokens": tokens for tokens in TOKENS})},
    "demo base": COMMON | {"tokens": _sweep("batch", {f"batch {batch}": batch for batch in BATCHES})},
}
TITLES = {
    "rank": "Rank",
    "tokens": "Resolution and batch size",
    "layers": "Perturbed layers",
    "checkpointing": "Gradient checkpointing",
    "text": "Text encoders",
}


def block_case(setting: Setting, sizes: BlockSizes, dtype: torch.dtype, device: torch.device) -> Case:
    """A block of SDXL between the projections around it, with random weights."""
    stack = Stack(sizes.blocks, setting.checkpointing, sizes.width, sizes.context_width(), projections=True)
    stack = stack.to(device, dtype)
    predict, widths = predict_of_stack(stack, setting.tokens, sizes.width, sizes.context_width())

    def text_encoders() -> Iterator[torch.nn.Module]:
        for kind, settings in (
            (CLIPTextModel, sizes.text_encoder),
            (CLIPTextModelWithProjection, sizes.text_encoder_2),
        ):
            yield kind(CLIPTextConfig(**settings)).to(device, dtype)

    return _case(setting, stack, predict, widths, text_encoders)


def demo_base_case(setting: Setting, device: torch.device) -> Case:
    """The demo base, in float32."""
    unet = demo_unet(device)
    if setting.checkpointing:
        unet.enable_gradient_checkpointing()
    predict, widths = predict_of_unet(unet, batch=setting.batch)

    def text_encoders() -> Iterator[torch.nn.Module]:
        for kind, folder in (
            (CLIPTextModel, "text_encoder"),
            (CLIPTextModelWithProjection, "text_encoder_2"),
        ):
            yield kind.from_pretrained(DEMO_BASE / folder, dtype=torch.float32).to(device)

    return _case(setting, unet, predict, widths, text_encoders)


def _case(
    setting: Setting,
    unet: torch.nn.Module,
    predict: Predict,
    widths: tuple[int, int],
    text_encoders: Callable[[], Iterator[torch.nn.Module]],
) -> Case:
    if setting.text is not None:
        model = WithTextEncoders(unet, *text_encoders())
        return text_encoders_case("", model, predict, setting.text, setting.batch)
    return cached_prompts_case("", unet, predict, widths, setting.batch, setting.rank, setting.targets)


def measure_sweep(
    name: str, repeats: int, sizes: BlockSizes, dtype: torch.dtype, device: torch.device
) -> list[Result]:
    """Measure one sweep, on the block and then on the demo base."""
    results = []
    for what, sweeps in SWEEPS.items():
        for label, setting in sweeps[name]:
            if what == "block":
                case = block_case(setting, sizes, dtype, device)
            else:
                case = demo_base_case(setting, device)
            case.name = f"{what}, {label}"
            results.append(measure(case, math.inf, repeats, (PLAIN, FLAT)))
            print(row(results[-1]), file=sys.stderr, flush=True)  # progress: a full run takes minutes
    return results


def row(result: Result) -> str:
    """One setting as a row of a Markdown table."""
    plain, flat = result.seconds[PLAIN], result.seconds[FLAT]
    memory = result.memory[FLAT]
    cells = [
        result.case,
        f"{result.adapted_layers}",
        f"{result.all_weights_mib:.4g}",
        f"{statistics.median(plain):.4g}",
        f"{statistics.median(flat):.4g}",
        ratio(flat, plain),
        *(f"{memory[key]:.2f}" for key in ("at_rest_mib", "between_layers_mib", "peak_mib")),
    ]
    return f"| {' | '.join(cells)} |"


def table(name: str, results: list[Result]) -> str:
    """One sweep as a Markdown table."""
    lines = [
        f"### {TITLES[name]}",
        "",
        "| | perturbed weights | MiB | LoRA, s / step | Flat-LoRA, s / step | x LoRA (min-max) "
        "| at rest, MiB | between layers, MiB | peak, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(row, results),
    ]
    return "\n".join(lines)


def report(results: dict[str, list[Result]], repeats: int, sizes: BlockSizes, dtype: str) -> str:
    """The whole run in Markdown."""
    head = (
        "## How the cost of Flat-LoRA grows\n\n"
        f"{machine()}.\n\n"
        f"Flat-LoRA with the table of normals and sigma {SIGMA}. Block: {sizes.blocks} of SDXL's transformer "
        f"blocks of width {sizes.width} between two projections, {dtype}, with text encoders of "
        f"{sizes.text_encoder['num_hidden_layers']} and {sizes.text_encoder_2['num_hidden_layers']} layers "
        f"where they are on. Unless the row says otherwise: rank {RANK}, the attention's projections, "
        f"{Setting.tokens:,} tokens, batch {Setting.batch}, no gradient checkpointing, text encoders off. "
        f"{repeats} repeats; times are medians, ratios are taken repeat by repeat. Memory is what Flat-LoRA "
        "holds beyond plain LoRA: after the step, at the boundary between two LoRA layers where it is "
        "largest, and at the peak of the step."
    )
    return "\n\n".join([head, *(table(*item) for item in results.items())]) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser("growth", __doc__)
    parser.add_argument("--sweep", nargs="+", choices=TITLES, default=list(TITLES), help="which sweeps (all)")
    parser.add_argument("--repeats", type=positive, default=11, help="repeats of every setting (11)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default_dtype(),
        help="precision of the block (bf16 if the device has it in hardware, else fp32)",
    )
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, sizes: BlockSizes | None = None) -> None:
    """Run the sweeps asked for and print the report."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = sizes or BlockSizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        name: measure_sweep(name, options.repeats, sizes, DTYPES[options.dtype], device)
        for name in dict.fromkeys(options.sweep)
    }
    content = {name: [asdict(result) for result in measured] for name, measured in results.items()}
    write_report(report(results, options.repeats, sizes, options.dtype), content, options.output)


if __name__ == "__main__":
    main()
