"""Where the host's time of a step goes, plain and Flat: case (d) of `benchmarks.overhead`, profiled.

    python -m benchmarks.host_profile --output host-profile.md

The profiler makes every call of a Python function dearer, so the sums are larger than what
`benchmarks.overhead` measures; what counts is how the parts compare.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats

import torch
from peft.tuners.lora.layer import LoraLayer

from benchmarks.cases import host_case
from benchmarks.common import add_common_options, machine, positive, write_report
from benchmarks.step_arms import ARMS, FLAT, PLAIN, copy_sharing_base

PARTS = {
    "the LoRA layer's forward pass": (
        ("peft/tuners/lora/layer.py", "forward"),
        ("flat/layer.py", "_fused_forward"),
    ),
    "the backward pass, all of it": (("torch/autograd/graph.py", "_engine_run_backward"),),
    "... of it the fused layer's": (("flat/fused.py", "backward"),),
    "what a step prepares: norms, draws": (("flat/prepare.py", "prepare"),),
    "... of it hashes of names": (("common/seeds.py", "hash64"),),
    "... of it norms, `W A^T` first": (("flat/row_norms.py", "merged_row_norms"),),
    "... of it draws, hashes among them": (("flat/noise.py", "draws"),),
    "whether anybody has changed a layer": (("flat/layer.py", "contents"),),
    "switching the noise on": (("flat/layer.py", "perturb"),),
    "switching it off": (("flat/layer.py", "restore"),),
    "AdamW": (("torch/optim/optimizer.py", "wrapper"),),
}
"""What a row is about -> the functions whose time, calls included, it adds up: file and name."""


def profile(name: str, steps: int) -> tuple[dict[str, float], float]:
    """Seconds a layer and step of each part, and of the whole step."""
    case = host_case(torch.device("cpu"))
    model = copy_sharing_base(case.model).train()
    arm = ARMS[name](model, model.get_submodule(case.perturbed) if case.perturbed else model)
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    for _ in range(3):
        arm.train_step(case.loss)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        arm.train_step(case.loss)
    profiler.disable()
    stats = pstats.Stats(profiler)
    seconds = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():  # pyright: ignore[reportAttributeAccessIssue]
        for part, functions in PARTS.items():
            if any(file.replace("\\", "/").endswith(end) and function == wanted for end, wanted in functions):
                seconds[part] += cumulative
    each = layers * steps
    return {part: value / each for part, value in seconds.items()}, stats.total_tt / each  # pyright: ignore[reportAttributeAccessIssue]


def report(steps: int) -> str:
    """The table in Markdown."""
    (plain, plain_whole), (flat, flat_whole) = profile(PLAIN, steps), profile(FLAT, steps)
    lines = [
        "## Where the host's time goes",
        "",
        machine() + ".",
        "",
        f"8 tiny blocks, {steps} steps of each arm under Python's profiler: microseconds a LoRA layer "
        "and step.",
        "",
        "| | plain LoRA | Flat-LoRA, table |",
        "|---|--:|--:|",
        f"| the step | {plain_whole * 1e6:.0f} | {flat_whole * 1e6:.0f} |",
    ]
    lines += [f"| {part} | {plain[part] * 1e6:.0f} | {flat[part] * 1e6:.0f} |" for part in PARTS]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Profile both arms and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.host_profile",
    )
    parser.add_argument("--steps", type=positive, default=50, help="steps of each arm (50)")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = report(options.steps)
    write_report(text, {"table": text}, options.output)


if __name__ == "__main__":
    main()
