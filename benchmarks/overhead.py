"""What Flat-LoRA costs: time and memory of one training step beside plain LoRA, the in-place method and SAM.

    python -m benchmarks.overhead                          # all cases that this machine can run
    python -m benchmarks.overhead --case b --dtype fp32 --layers 4 --minutes 5 --output overhead.md

Every arm (plain LoRA as PEFT computes it, Flat-LoRA with either source of noise and over PEFT's own layers,
the published in-place method, sharpness-aware minimisation on the merged weights) takes one full step per
repeat: forward, backward, AdamW; SAM takes the passes twice. Arms share the frozen weights and alternate
within a repeat, in an order that rotates, so that a slow moment of the machine falls on all of them alike;
ratios are taken repeat by repeat. Memory is measured in the warm-up.

Cases: (a) the demo UNet, float32; (b) a stack of SDXL's largest transformer blocks, without and with gradient
checkpointing; (c) the whole SDXL UNet with random weights, without and with gradient checkpointing, on a GPU
only; (d) tiny blocks, whose step is the host's work alone: the time that is added is told for each layer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.cases import Case, demo_case, host_case, sdxl_case, stack_case
from benchmarks.common import (
    DEMO_BASE,
    DTYPES,
    RANK,
    TARGETS,
    add_common_options,
    benchmark_parser,
    default_dtype,
    machine,
    positive,
    write_report,
)
from benchmarks.step_arms import PLAIN
from benchmarks.steps import Result, measure, ratio


def table(result: Result) -> str:
    """One case as a Markdown table."""
    lines = [
        f"### {result.case}",
        "",
        f"{len(result.seconds[PLAIN])} repeats. {result.adapted_layers} adapted weights: the largest has "
        f"{result.largest_weight_mib:.3g} MiB, all have {result.all_weights_mib:.4g} MiB.",
        "",
        "| | s / step | x plain (min-max) | adds, ms | for a layer, us | at rest, MiB | between layers, MiB "
        "| peak, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    plain = result.seconds[PLAIN]
    for name, seconds in result.seconds.items():
        added = statistics.median(one - other for one, other in zip(seconds, plain, strict=True))
        memory = result.memory[name]
        cells = [name, f"{statistics.median(seconds):.4g}"]
        if name == PLAIN:
            cells += ["1", *["-"] * 5]
        else:
            cells += [
                ratio(seconds, plain),
                f"{1000 * added:.1f}",
                f"{1e6 * added / result.adapted_layers:.0f}",
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
    parser = benchmark_parser("overhead", __doc__)
    parser.add_argument("--case", nargs="+", choices="abcd", default=list("abcd"), help="which cases (all)")
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
            builds += [functools.partial(sdxl_case, checkpointing) for checkpointing in (False, True)]
        else:
            skipped.append("Case (c) was left out: there is no GPU.")
    if "d" in options.case:
        builds.append(functools.partial(host_case, device))

    results = []
    for index, build in enumerate(builds):
        share = (end - time.monotonic()) / (len(builds) - index)
        results.append(measure(build(), time.monotonic() + share, options.repeats))
        print(table(results[-1]), end="\n\n", file=sys.stderr)  # progress: a full run takes minutes

    content = {"skipped": skipped, "results": [asdict(result) for result in results]}
    write_report(report(results, skipped), content, options.output)


if __name__ == "__main__":
    main()
