"""What adapters change, in figures and plots: how well they personalise, what they forget, how flat they are.

python -m flatlora_diffusion.evaluate --base stabilityai/stable-diffusion-xl-base-1.0 \
        --adapter LoRA=out/lora --adapter Flat-LoRA=out/flat_lora \
        --heldout icons-heldout --training icons --clip openai/clip-vit-large-patch14
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.common.command import OneLineParser, hide_progress_bars, invoked_as, parse_adapter
from flatlora_diffusion.common.devices import DTYPES, checked_device
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.lock import check_writable, output_lock
from flatlora_diffusion.data.images import PROMPT_PLACEHOLDER, Sample, find_samples
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.evaluate.evaluation import PARTS, Evaluation, Plan
from flatlora_diffusion.evaluate.plots import write_plots
from flatlora_diffusion.evaluate.tables import markdown

TABLES = "evaluation.md"


def evaluate(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure a plan; write `evaluation.json`, `evaluation.md` and the plots into a folder.

    An evaluation that was stopped goes on where it was; what was measured in the same way is kept.

    Returns:
        The report: see `evaluate.report`.

    Raises:
        UserError: Something is missing, damaged, or doesn't fit; nothing has been written.
    """
    import_extra("matplotlib", "drawing plots")  # before hours of measuring, not after them
    check_writable("--output", folder)
    evaluation = Evaluation(plan, folder)
    with output_lock(folder, "--output"):
        report = evaluation.run()
        paths = write_plots(report, folder)
        images = "".join(f"\n![{path.stem}]({path.name})\n" for path in paths)
        write_atomically(folder / TABLES, (markdown(report) + images).encode())
    return report


def evaluation_parser() -> OneLineParser:
    """The parser; flags that aren't given leave nothing behind."""
    parser = OneLineParser(
        prog=invoked_as("python -m flatlora_diffusion.evaluate"),
        description="Measure what adapters change, against their base: personalisation, retention, flatness "
        "and the trade-off over inference scales. The folder gets evaluation.json, evaluation.md and plots. "
        "The same command goes on after an interruption.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--base", required=True, help="Folder or hub name of the SDXL pipeline.")
    add(
        "--adapter",
        type=parse_adapter,
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="An adapter, a file or the folder of a run; may be given several times.",
    )
    add(
        "--heldout",
        type=Path,
        required=True,
        metavar="DIR",
        help="Pictures of the taught style whose subjects were never trained, with captions (metadata.jsonl "
        "or .txt files).",
    )
    add(
        "--training",
        type=Path,
        metavar="DIR",
        help="The training pictures: for the loss at their place, its flatness, and how near drawn pictures "
        "come to copying. Without them flatness is that of the held-out pictures' loss.",
    )
    add(
        "--retention",
        type=Path,
        metavar="DIR",
        help="Pictures of the base's own styles, with captions that don't ask for what was taught.",
    )
    add(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="In place of --retention: prompts that don't ask for what was taught; the base's own pictures "
        "of them are what is to be kept.",
    )
    add("--instance_prompt", metavar="TEXT", help="In place of missing captions, as in training.")
    add(
        "--clip",
        metavar="CLIP",
        help="Folder or hub name of a CLIP, such as openai/clip-vit-large-patch14. Without it nothing is "
        "drawn: no CLIP-I, CLIP-T, copying and drift.",
    )
    add("--resolution", type=int, metavar="PIXELS", help="Of pictures and losses (default: the base's own).")
    add("--steps", type=int, metavar="N", help="Denoising steps of drawn pictures (default: 30).")
    add("--guidance", type=float, metavar="X", help="Classifier-free guidance of them (default: 5).")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="Measure only these (default: all for which there is what they need).",
    )
    add("--device", help="Such as cuda or cpu (default: the accelerator at hand).")
    add(
        "--dtype",
        choices=DTYPES,
        help="Precision (default: fp32; half precision rounds away much of what adapters differ in).",
    )
    add("--output", type=Path, metavar="FOLDER", help="Where the results go (default: evaluation).")
    return parser


def read_plan(given: dict[str, Any]) -> Plan:
    """The evaluation that the flags ask for.

    Args:
        given: Flag without its dashes -> value, for each that was given.

    Raises:
        UserError: Names what is missing, wrong or too much.
    """
    if "retention" in given and "prompt" in given:
        raise UserError("--retention and --prompt: give only one of them")
    if "prompt" in given and "clip" not in given:
        raise UserError("--prompt needs --clip: it asks for pictures, which a CLIP compares")
    adapters: dict[str, Path] = {}
    for label, path in given["adapter"]:
        if label == BASE:
            raise UserError(f"--adapter {label}={path}: the base itself is called so; give it another name")
        if label in adapters:
            raise UserError(
                f"--adapter {label}={path}: {label} is {adapters[label]} already; give another name"
            )
        adapters[label] = path
    for flag in ("resolution", "steps"):
        if flag in given and (given[flag] < 1 or (flag == "resolution" and given[flag] % 8)):
            what = "a multiple of 8" if flag == "resolution" else "1 or more"
            raise UserError(f"--{flag} {given[flag]}: must be {what}")
    samples = {
        flag: _samples(flag, given[flag], given.get("instance_prompt"))
        for flag in ("heldout", "training", "retention")
        if flag in given
    }
    names = ("clip", "resolution", "steps", "guidance", "parts", "dtype")
    return Plan(
        base=given["base"],
        adapters=adapters,
        prompts=given.get("prompt", ()),
        device=checked_device(given.get("device")),
        **samples,
        **{name: given[name] for name in names if name in given},
    )


def _samples(flag: str, folder: Path, instance_prompt: str | None) -> list[Sample]:
    samples = find_samples(folder, instance_prompt or PROMPT_PLACEHOLDER, f"--{flag} {folder}")
    for sample in samples:
        if PROMPT_PLACEHOLDER in sample.caption:
            raise UserError(f"--{flag} {folder}: {sample.path.name} has no caption; give --instance_prompt")
    return samples


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    given = vars(evaluation_parser().parse_all(sys.argv[1:] if arguments is None else list(arguments)))
    plan = read_plan(given)
    hide_progress_bars()
    folder = given.get("output", Path("evaluation"))
    try:
        report = evaluate(plan, folder)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device {plan.device}: its memory ran out while models were loaded; --dtype bf16 halves them"
        ) from None
    print(markdown(report))
    print(folder / TABLES)
    if report["left_out"]:
        raise UserError("; ".join(report["left_out"]))
