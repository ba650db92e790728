"""The rehearsal's command; see the package for what it does."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

import benchmarks.rehearsal
from benchmarks.rehearsal.drawing import (
    rehearse_evaluation,
    rehearse_grid,
    rehearse_page,
    rehearse_short_memory,
    rehearse_validation,
)
from benchmarks.rehearsal.full import launches, memory
from benchmarks.rehearsal.step import rehearse_quantized, rehearse_step
from flatlora_diffusion.draw.samplers import DEFAULT, SAMPLERS

HOW = """this torch has no CUDA build, so there is nothing to rehearse on. To make one that has:
    python3 -m venv /somewhere/cuda && /somewhere/cuda/bin/pip install torch -e '.[dev]'
    /somewhere/cuda/bin/python -m benchmarks.rehearsal
(5 GB; without a version or a constraint, pip takes the CUDA build on Linux)"""
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def rehearsals() -> Iterator[tuple[str, Callable[[], str]]]:
    """What each is called, and the work, which says what was done."""
    for dtype, source, mode in (
        (BRAIN, "table", {}),
        (BRAIN, "gaussian", {"checkpointing": True}),
        (HALF, "table", {"checkpointing": True}),
        (HALF, "gaussian", {"all_layers": True}),
        (SINGLE, "table", {"all_layers": True}),
        (SINGLE, "gaussian", {}),
        (BRAIN, "table", {"dora": True}),
        (HALF, "table", {"dora": True, "checkpointing": True, "all_layers": True}),
    ):
        name = f"step, {dtype}, {source}{''.join(f', {word}' for word in mode)}"
        yield name, partial(rehearse_step, dtype, source, **mode)
    for kind, noisy in itertools.product(("4bit", "8bit"), (False, True)):
        name = "Flat-LoRA" if noisy else "LoRA"
        yield f"step, base in {kind}, {name}", partial(rehearse_quantized, kind, noisy)
    for dtype in (HALF, BRAIN, SINGLE):
        yield f"validation, {dtype}", partial(rehearse_validation, dtype)
        samplers = SAMPLERS if dtype == BRAIN else (DEFAULT,)
        yield f"page, {dtype}, samplers {', '.join(samplers)}", partial(rehearse_page, dtype, samplers)
        yield f"drawing in little memory, {dtype}", partial(rehearse_short_memory, dtype)
    yield f"grid, {BRAIN}", partial(rehearse_grid, BRAIN)
    yield f"evaluation, {BRAIN}", partial(rehearse_evaluation, BRAIN)


def say(line: str) -> None:
    """Print at once: a rehearsal takes minutes."""
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the number of rehearsals that failed."""
    parser = argparse.ArgumentParser(
        description=benchmarks.rehearsal.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="SDXL at 1024 px too (minutes)")
    given = parser.parse_args(arguments)
    if torch.version.cuda is None:
        say(HOW)
        return 0
    failed = 0
    for name, rehearse in rehearsals():
        try:
            say(f"{name}: {rehearse()}")
        except Exception as error:
            failed += 1
            say(f"{name}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if given.full:
        plain, noisy = launches()
        say(f"launches of a step with checkpointing: plain {plain}, Flat-LoRA {noisy - plain} more")
        for line in memory():
            say(line)
    return failed


if __name__ == "__main__":
    sys.exit(main())
