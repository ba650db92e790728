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

from flatlora_diffusion.adapter.mix import parse_source
from flatlora_diffusion.common.command import (
    DTYPE_NAMES,
    OneLineParser,
    hide_progress_bars,
    invoked_as,
)
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.processes import Processes, joined
from flatlora_diffusion.evaluate.plan import PARTS


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
    add("--base", required=True, help="Folder or hub name of the SDXL pipeline, or one .safetensors file.")
    add(
        "--adapter",
        type=parse_source,
        action="append",
        required=True,
        metavar="NAME=PATH[@SCALE][+PATH...]",
        help="An adapter, a file or the folder of a run; may be given several times. Several at once: "
        "mix=style.safetensors@0.8+subject.safetensors@0.6.",
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
        "--kohya_folders",
        action="store_true",
        help="Read sub-folders that are named as for kohya's scripts (10_fox) too, as in training.",
    )
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
        "--caption_chunks",
        type=int,
        metavar="N",
        help="Read captions and prompts in N pieces, of 75 tokens for SDXL (default: 1), as in training.",
    )
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="Measure only these (default: all for which there is what they need).",
    )
    add(
        "--write_scale",
        action="store_true",
        help="Note the recommended scale in each adapter's file, where the app reads it, and in its model "
        "card; hashes in pictures and manifests stay valid. Files of other programs stay as they are.",
    )
    add("--device", help="Such as cuda or cpu (default: the accelerator at hand).")
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        help="Precision (default: fp32; half precision rounds away much of what adapters differ in).",
    )
    add("--output", type=Path, metavar="FOLDER", help="Where the results go (default: evaluation).")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    with joined() as processes:
        _evaluate(sys.argv[1:] if arguments is None else list(arguments), processes)


def _evaluate(arguments: Sequence[str], processes: Processes) -> None:
    given = vars(evaluation_parser().parse_all(arguments))
    # After parsing: --help and bad flags answer at once.
    from flatlora_diffusion.common.devices import is_out_of_memory
    from flatlora_diffusion.evaluate.request import TABLES, evaluate, read_plan
    from flatlora_diffusion.evaluate.tables import markdown

    plan = read_plan(given)
    hide_progress_bars()
    folder = given.get("output", Path("evaluation"))
    try:
        report = evaluate(plan, folder, write_scale=given.get("write_scale", False), processes=processes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--device {plan.device}: its memory ran out while models were loaded; --dtype bf16 halves them"
        ) from None
    if not processes.is_main:
        return
    print(markdown(report))
    print(folder / TABLES)
    if report["left_out"]:
        raise UserError("; ".join(report["left_out"]))
