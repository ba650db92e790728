"""What a user of the trainer waits for, and the memory it takes, beside what the diffusers script does.

    python -m benchmarks.trainer                            # all cases that this machine can run
    python -m benchmarks.trainer --case b --dtype fp32 --repeats 20 --starts 5 --output trainer.md

Arms: the diffusers script's training (`benchmarks.reference`) with a caption for each image, and so both text
encoders in every step, and with one prompt for all; and `flatlora_diffusion.train`, plain and Flat-LoRA, as
`train_dreambooth_flat.py` calls it. All train the same images with the same settings; Flat-LoRA's sigma is
constant, so that its noise is there from the first step. This project's runs encode all images and captions
before their first step, but for those of one arm, which find what an earlier run has kept.

Every arm runs in a process of its own, from which its start-up (from starting Python to the first optimizer
step done) and its peak memory are taken: what the process has in memory, or on a GPU its tensors. Then the
arms take steps in turn, in an order that rotates; only one works at a time. A step is everything until the
next one begins: data, forward, backward, clipping, AdamW, logging. Ratios are taken repeat by repeat.
Starting and stepping is done several times over.

Cases: (a) the demo base; (b) SDXL made small, with random weights (`benchmarks.bases.MIDSIZE`); (c) SDXL
itself at 1024 px, with random weights: on a GPU with room for four processes (about 48 GiB with gradient
checkpointing) and with 8 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.arms import ARMS, SCRIPT, Arm, Process
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
from flatlora_diffusion.config.settings import TrainConfig

# The processes of the arms import this module too: what they don't need is imported where it is used.

ICONS = DEMO_BASE.parent / "icons-3d"
PROMPT = "a fluent 3d icon"
DEMO_RESOLUTION = 128
PAPER_STEPS = 500
# Threads of the arm that has just worked spin for a while before they sleep.
PAUSE = 0.02


# Measuring.


@dataclass(frozen=True)
class Case:
    """A base to train, and how."""

    name: str
    base: Path
    resolution: int
    mixed_precision: str
    gradient_checkpointing: bool
    batch_size: int = 1

    def config(self, arm: Arm, folder: Path, steps: int) -> TrainConfig:
        """The settings of a run of so many steps."""
        return TrainConfig(
            pretrained_model_name_or_path=str(self.base),
            instance_data_dir=str(ICONS),
            instance_prompt=PROMPT,
            output_dir=str(folder),
            resolution=self.resolution,
            rank=RANK,
            train_batch_size=self.batch_size,
            max_train_steps=steps,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            flat_sigma=arm.sigma,
            flat_schedule="constant",
            report_to="none",
        )


@dataclass
class Result:
    """What was measured in one case, by arm.

    Attributes:
        case: Its name.
        shares: Of the arithmetic of the diffusers script's step, by part of the base.
        starts: How often the arms were started.
        seconds: Of every step but the first of each start.
        start_up: Seconds from starting Python to the first step done, of every start.
        peak: Bytes, of every start.
    """

    case: str
    shares: dict[str, float]
    starts: int
    seconds: dict[str, list[float]]
    start_up: dict[str, list[float]]
    peak: dict[str, list[int]]


def measure(case: Case, starts: int, repeats: int, folder: Path) -> Result:
    """Start the arms, let them take steps in turn and stop them, so many times over.

    Args:
        case: What to train.
        starts: How often the arms are started.
        repeats: Steps of each arm after the first, at each start.
        folder: For what the arms write.
    """
    from benchmarks.bases import Sizes, step_flops
    from flatlora_diffusion.data.images import find_samples

    samples = [(sample.path, sample.caption) for sample in find_samples(ICONS, PROMPT)]
    _fetch_files(case.base)
    sizes = Sizes.of(case.base, case.resolution)
    folder.mkdir()
    flops = step_flops(sizes, gradient_checkpointing=case.gradient_checkpointing)
    result = Result(case.name, flops.shares(), starts, *({name: [] for name in ARMS} for _ in range(3)))
    kept = folder / "kept"
    _fill(kept, case, samples, folder / "earlier")
    for start in range(starts):
        with contextlib.ExitStack() as stack:
            processes = {}
            for index, name in enumerate(rotated(list(ARMS), start)):
                output = folder / f"{start}-{index}"
                # One more than are taken, so that no arm comes to its end and saves its adapter.
                config = case.config(ARMS[name], output, repeats + 2)
                cache = kept if ARMS[name].later else output.with_suffix(".kept")
                processes[name] = Process(name, config, samples, output.with_suffix(".log"), cache)
                stack.callback(processes[name].kill)
                result.start_up[name].append(processes[name].start_up)
            for repeat in range(repeats):
                for name in rotated(list(ARMS), repeat):
                    time.sleep(PAUSE)
                    result.seconds[name].append(processes[name].step())
            for name, process in processes.items():
                result.peak[name].append(process.stop())
    return result


def rotated(names: list[str], by: int) -> list[str]:
    """The names from one of them on, and around."""
    by %= len(names)
    return names[by:] + names[:by]


def _fill(cache: Path, case: Case, samples: Sequence[tuple[Path, str]], output: Path) -> None:
    """Let a run of one step keep what it encodes, for the arms that are later runs."""
    for name, arm in ARMS.items():
        if arm.later:
            Process(name, case.config(arm, output, 2), samples, output.with_suffix(".log"), cache).kill()


def _fetch_files(base: Path) -> None:
    """Read what all arms will read, so that none of them is the first to fetch it from the disk."""
    for module in ("benchmarks.reference", "flatlora_diffusion.train"):
        importlib.import_module(module)
    for file in base.rglob("*"):
        if file.is_file():
            file.read_bytes()


# Reporting.


def table(result: Result) -> str:
    """One case as a Markdown table."""
    shares = result.shares
    repeats = len(result.seconds[SCRIPT]) // result.starts
    lines = [
        f"### {result.case}",
        "",
        f"{result.starts} starts, {repeats} steps after each. Of the arithmetic of the script's step the VAE "
        f"has {shares['vae']:.1%}, the text encoders {shares['text_encoders']:.1%}, the UNet "
        f"{shares['unet']:.1%}.",
        "",
        f"| | s / step | x script (min-max) | start-up, s | x script (min-max) | peak, MiB | "
        f"{PAPER_STEPS} steps, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in ARMS:
        seconds = statistics.median(result.seconds[name])
        start_up = statistics.median(result.start_up[name])
        cells = [
            name,
            f"{seconds:.4g}",
            ratio(result.seconds[name], result.seconds[SCRIPT]),
            f"{start_up:.1f}",
            ratio(result.start_up[name], result.start_up[SCRIPT]),
            f"{statistics.median(result.peak[name]) / 2**20:.0f}",
            f"{start_up + (PAPER_STEPS - 1) * seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(ones: list[float], others: list[float]) -> str:
    """Median, least and greatest of the paired ratios."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def report(results: list[Result], skipped: list[str]) -> str:
    """The whole run in Markdown."""
    memory = "GPU's tensors" if torch.cuda.is_available() else "process"
    head = (
        "## The trainer beside the diffusers script\n\n"
        f"{machine()}.\n\n"
        f"LoRA of rank {RANK} on {', '.join(TARGETS)}; Flat-LoRA with sigma {SIGMA}. Numbers are medians; "
        f"ratios are taken repeat by repeat. Peak memory is that of the {memory}. {PAPER_STEPS} steps are "
        "start-up and steps together."
    )
    return "\n\n".join([head, *map(table, results), *skipped]) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser("trainer", __doc__)
    parser.add_argument("--case", nargs="+", choices="abc", default=list("abc"), help="which cases (all)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the base (bf16 if the device has it in hardware, else fp32)",
    )
    parser.add_argument("--repeats", type=positive, default=10, help="steps after each start (10)")
    parser.add_argument("--starts", type=positive, default=3, help="starts of every arm in every case (3)")
    parser.add_argument("--batch-size", type=positive, default=1, help="images a step (1)")
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations again in the backward pass (by default in case c only)",
    )
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the cases asked for and print the report."""
    options = parse(arguments)
    # For the processes of the arms: all have the same threads, and none waits for the hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    has_gpu = torch.cuda.is_available()
    results, skipped = [], []
    with tempfile.TemporaryDirectory() as folder:
        for letter in sorted(set(options.case)):
            if letter == "c" and not has_gpu:
                skipped.append("Case (c) was left out: there is no GPU.")
                continue
            case = make_case(letter, options, Path(folder, letter))
            results.append(measure(case, options.starts, options.repeats, Path(folder, f"{letter}-runs")))
            print(table(results[-1]), end="\n\n", file=sys.stderr)  # progress: a full run takes minutes
    content = {"skipped": skipped, "results": [asdict(result) for result in results]}
    write_report(report(results, skipped), content, options.output)


def make_case(letter: str, options: argparse.Namespace, folder: Path) -> Case:
    """A case by its letter; a base with random weights is written into the folder."""
    from benchmarks.bases import MIDSIZE, SDXL, write_base
    from flatlora_diffusion.common.devices import release

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if letter == "a":
        what, base, resolution = "demo base", DEMO_BASE, DEMO_RESOLUTION
    else:
        what, sizes = ("mid-size SDXL", MIDSIZE) if letter == "b" else ("SDXL", SDXL)
        write_base(sizes, folder, device)
        release()
        what, base, resolution = f"{what} with random weights", folder, sizes.resolution
    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        checkpointing = letter == "c"
    dtype = options.dtype or default_dtype()
    name = (
        f"({letter}) {what}, {dtype}, {device.upper()}, {resolution} px, batch {options.batch_size}, "
        f"gradient checkpointing {'on' if checkpointing else 'off'}"
    )
    precision = "no" if dtype == "fp32" else dtype
    return Case(name, base, resolution, precision, checkpointing, options.batch_size)


if __name__ == "__main__":
    main()
