"""Time and memory of a training step on the whole of SDXL, at its real sizes with random weights.

    python -m benchmarks.full_sdxl                              # UNet: 256 px on a CPU, 1024 px on a GPU
    python -m benchmarks.full_sdxl --text_encoders --arms plain flat --steps 1 --resolution 128
    python -m benchmarks.full_sdxl --dtype fp32                 # where the processor has no bf16 units

Arms: plain LoRA, Flat-LoRA (table), the published in-place method, and sharpness-aware minimisation on the
merged weights, each in a process of its own, one after the other. Batch 1, gradient checkpointing. Memory is
what the process had at most (on a GPU, its tensors), and its tensors alone in the first step: the frozen
weights and everything that the arm and its step made. The other steps are timed.

On a CPU an arm may use the memory that is free when it begins and no more: one that needs more is reported
as not fitting. Where the processor has no bf16 units a step in bf16 takes very long: --resolution 64
--steps 1 tells the memory beyond plain LoRA all the same, which belongs to the weights, and --dtype fp32
tells the time.

A process may have far more than its tensors: glibc 2.36, for one, doesn't fit a freed aligned block to a new
one of the same size, so that its heap grows by each weight that is perturbed for the first time. With
MALLOC_MMAP_THRESHOLD_=131072 in the environment such blocks go back to the system instead.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.bases import SDXL, Sizes
from benchmarks.cases import Case, WithTextEncoders, cached_prompts_case, predict_of_unet, text_encoders_case
from benchmarks.common import (
    DTYPES,
    RANK,
    SIGMA,
    add_common_options,
    benchmark_parser,
    dtype_name,
    machine,
    now,
    positive,
    proc_bytes,
    process_peak,
    write_report,
)
from benchmarks.memory import MIB
from benchmarks.sam import base_weights
from benchmarks.step_arms import ARMS, FLAT, IN_PLACE, PLAIN, SAM
from benchmarks.steps import first_step
from flatlora_diffusion.sdxl.lora import enable_gradient_checkpointing

CHOICES = {"plain": PLAIN, "flat": FLAT, "in_place": IN_PLACE, "sam": SAM}
LATENT_SCALE = 8
STRIDE = 32  # pixels to one of the UNet's deepest level

Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What every arm does.

    Attributes:
        sizes: Of the models.
        dtype: Of their frozen weights.
        resolution: In pixels.
        text_encoders: Whether both are trained, and perturbed, too.
        steps: Of which all but the first are timed.
        threads: Of the CPU; torch's choice by default.
    """

    sizes: Sizes
    dtype: torch.dtype
    resolution: int
    text_encoders: bool
    steps: int
    threads: int | None


@dataclass
class Measured:
    """Of one arm: bytes, and seconds of the steps after the first."""

    arm: str
    adapted_layers: int
    adapted_bytes: int
    frozen_bytes: int
    process_peak: int
    tensors_at_rest: int
    tensors_peak: int
    seconds: list[float]


def random_model(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model whose weights are drawn where they stay: no other copy of them is ever made.

    Matrices and filters have the standard deviation 1 / sqrt(inputs), biases are 0 and norms' scales 1.
    """
    with init_empty_weights(include_buffers=False):
        model = make()
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, shape in [(name, p.shape) for name, p in module.named_parameters(recurse=False)]:
            values = torch.empty(shape, dtype=dtype, device=device)
            if len(shape) == 1:
                values.fill_(float(name == "weight"))
            else:
                values.normal_(std=1 / math.sqrt(values[0].numel()), generator=generator)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    enable_gradient_checkpointing(model)
    return model.to(device)


def make_case(task: Task, device: torch.device) -> Case:
    """SDXL's UNet with LoRA, and both text encoders where they are asked for."""
    sizes, dtype = task.sizes, task.dtype
    unet = random_model(lambda: UNet2DConditionModel(**sizes.unet), dtype, device)
    predict, widths = predict_of_unet(unet, task.resolution // LATENT_SCALE)
    if not task.text_encoders:
        return cached_prompts_case("SDXL", unet, predict, widths)
    text_encoders = [
        random_model(lambda kind=kind, config=config: kind(CLIPTextConfig(**config)), dtype, device)
        for kind, config in (
            (CLIPTextModel, sizes.text_encoder),
            (CLIPTextModelWithProjection, sizes.text_encoder_2),
        )
    ]
    return text_encoders_case("SDXL", WithTextEncoders(unet, *text_encoders), predict)


def measure(name: str, task: Task) -> Measured | str:
    """Measure an arm in this process; where it doesn't fit into the memory, what was said of it."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    if task.threads:
        torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    if not has_gpu:
        limit_memory()
    try:
        case = make_case(task, device)
        tensors = [*case.model.parameters(), *case.model.buffers()]
        frozen_bytes = sum(tensor.nbytes for tensor in tensors)
        arm, memory = first_step(case, case.model, ARMS[name])
        seconds = []
        for _ in range(task.steps - 1):
            start = now(device)
            arm.train_step(case.loss)
            seconds.append(now(device) - start)
    except MemoryError:
        return "Python's own memory ran out"
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has none of its own
        if "memory" not in str(error):
            raise
        return str(error).splitlines()[0]
    weights = base_weights([case.model])
    return Measured(
        arm=name,
        adapted_layers=len(weights),
        adapted_bytes=sum(weight.nbytes for weight in weights),
        frozen_bytes=frozen_bytes,
        process_peak=process_peak(),
        tensors_at_rest=frozen_bytes + memory.at_rest,
        tensors_peak=frozen_bytes + memory.peak,
        seconds=seconds,
    )


def limit_memory() -> None:
    """Let this process have the memory that is free now: more is refused, and takes nobody else's."""
    free = Path("/proc/meminfo")
    if free.exists():
        limit = proc_bytes(free.read_text(encoding="utf-8"), "MemAvailable")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result | str:
    """Call a function in a new process; that it was killed, if it was."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            return executor.submit(function, *arguments).result()
    except BrokenProcessPool:
        return "its process was killed, as happens when the memory is used up"


def table(results: dict[str, Measured | str]) -> str:
    """The arms as a Markdown table."""
    lines = [
        "| | process at most, MiB | + plain | tensors after the step, MiB | + plain | at most, MiB | + plain "
        "| s / step (min-max) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    plain = results.get(PLAIN)
    for name, result in results.items():
        cells = [name]
        if isinstance(result, str):
            cells += [f"did not fit: {result}", *["-"] * 6]
        else:
            for key in ("process_peak", "tensors_at_rest", "tensors_peak"):
                value = getattr(result, key)
                cells.append(f"{value / MIB:,.0f}")
                if name == PLAIN or not isinstance(plain, Measured):
                    cells.append("-")
                else:
                    cells.append(f"{(value - getattr(plain, key)) / MIB:,.1f}")
            cells.append(spread(result.seconds))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(seconds: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(seconds):.4g} ({min(seconds):.4g}-{max(seconds):.4g})" if seconds else "-"


def report(results: dict[str, Measured | str], task: Task) -> str:
    """The whole run in Markdown."""
    what = "UNet and both text encoders" if task.text_encoders else "UNet"
    head = (
        "## A training step of the whole SDXL\n\n"
        f"{machine()}.\n\n"
        f"SDXL's {what} with random weights in {dtype_name(task.dtype)}, {task.resolution} px, batch 1, "
        f"gradient checkpointing, LoRA of rank {RANK}, sigma {SIGMA}. Each arm has a process of its own. "
    )
    measured = next((result for result in results.values() if isinstance(result, Measured)), None)
    if measured:
        size = measured.adapted_bytes / MIB
        head += (
            f"The frozen weights have {measured.frozen_bytes / MIB:,.0f} MiB; {measured.adapted_layers} of "
            f"them, with {size:,.0f} MiB, have a LoRA: as much is the noise that the in-place method keeps, "
            "and the gradient that SAM needs."
        )
    return f"{head}\n\n{table(results)}\n"


def pixels(text: str) -> int:
    """A resolution, for argparse."""
    value = positive(text)
    if value % STRIDE:
        raise argparse.ArgumentTypeError(f"{text} must be a multiple of {STRIDE}")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser("full_sdxl", __doc__)
    parser.add_argument("--arms", nargs="+", choices=CHOICES, default=list(CHOICES), help="which arms (all)")
    parser.add_argument("--text_encoders", action="store_true", help="train and perturb both of them too")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the frozen weights (bf16)")
    parser.add_argument("--resolution", type=pixels, help="pixels (1024 on a GPU, else 256)")
    parser.add_argument("--steps", type=positive, default=4, help="steps; the first is not timed (4)")
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, sizes: Sizes = SDXL) -> None:
    """Measure the arms asked for and print the report."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    resolution = options.resolution or (1024 if torch.cuda.is_available() else 256)
    task = Task(
        sizes, DTYPES[options.dtype], resolution, options.text_encoders, options.steps, options.threads
    )
    results: dict[str, Measured | str] = {}
    for choice in dict.fromkeys(options.arms):
        name = CHOICES[choice]
        results[name] = in_own_process(measure, name, task)
        print(name, results[name], file=sys.stderr, flush=True)  # progress: a full run takes long
    content = {
        "dtype": options.dtype,
        "resolution": resolution,
        "text_encoders": task.text_encoders,
        "arms": {
            name: result if isinstance(result, str) else asdict(result) for name, result in results.items()
        },
    }
    write_report(report(results, task), content, options.output)


if __name__ == "__main__":
    main()
