"""The flags of `python -m flatlora_diffusion.grid`. They import nothing slow: `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from flatlora_diffusion.adapter.mix import parse_scaled
from flatlora_diffusion.common.command import DTYPE_NAMES, OneLineParser, invoked_as
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.grid.plan import AXES, DRAWING_AXES
from flatlora_diffusion.sheet.command import add_measures


def grid_parser() -> OneLineParser:
    """The parser; flags that aren't given leave nothing behind."""
    parser = OneLineParser(
        prog=invoked_as("python -m flatlora_diffusion.grid"),
        usage="%(prog)s --base BASE --prompt TEXT [TEXT ...] --output FOLDER [options]\n"
        "       %(prog)s --manifest FOLDER/manifest.json --output FOLDER\n"
        "       %(prog)s FOLDER --output FILE.png",
        description="Draw prompts x seeds x methods from the same initial noise: an SDXL base and its "
        "adapters. The folder gets each picture, sheet.png and manifest.json. The same command goes on after "
        "an interruption; the manifest draws the grid again; a folder alone is laid out again (flags: "
        "python -m flatlora_diffusion.sheet --help).",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--base", help="Folder or hub name of the SDXL pipeline, or one .safetensors file.")
    add(
        "--adapter",
        type=parse_scaled,
        action="append",
        metavar="NAME=PATH[@SCALE][+PATH...]",
        help="An adapter to compare, a file or the folder of a run; may be given several times, also one "
        "adapter with several scales. Several at once: mix=style.safetensors@0.8+subject.safetensors@0.6.",
    )
    add("--no_base", action="store_true", help="Leave out the base without adapters.")
    add("--prompt", nargs="+", metavar="TEXT", help="One or more prompts.")
    add(
        "--prompts_file", type=Path, metavar="FILE", help="Prompts, one a line; lines with # are passed over."
    )
    add(
        "--captions", type=Path, metavar="DIR", help="The captions of a folder of training images as prompts."
    )
    add("--dataset_name", metavar="NAME", help="The same of a Hugging Face dataset, of its split train.")
    add("--caption_column", metavar="KEY", help="Where the captions are: a column, a key of metadata.jsonl.")
    add("--instance_prompt", metavar="TEXT", help="In place of missing captions, as in training.")
    add(
        "--kohya_folders",
        action="store_true",
        help="Read sub-folders of --captions that are named as for kohya's scripts (10_fox) too.",
    )
    add("--limit", type=int, metavar="N", help="Take the first N prompts.")
    add("--seed", nargs="+", type=int, metavar="N", help="One or more seeds for each prompt (default: 0).")
    axes = (*AXES, *DRAWING_AXES)
    add("--rows", nargs="+", choices=axes, help="What goes downwards, slowest first (default: prompt seed).")
    add(
        "--columns", nargs="+", choices=axes, help="What goes to the right (default: all that --rows leaves)."
    )
    add("--negative_prompt", metavar="TEXT", help="What guidance steers away from.")
    add("--resolution", type=int, metavar="PIXELS", help="Width and height (default: the base's own).")
    add("--width", type=int, metavar="PIXELS", help="In place of --resolution.")
    add("--height", type=int, metavar="PIXELS", help="The same.")
    several = "several are an axis, downwards unless --columns names it."
    add("--steps", nargs="+", type=int, metavar="N", help=f"Denoising steps (default: 50); {several}")
    add(
        "--guidance",
        nargs="+",
        type=float,
        metavar="X",
        help="Classifier-free guidance (default: 5); several are one, too.",
    )
    add("--sampler", nargs="+", choices=SAMPLERS, help="Default: the base's own. Several are one, too.")
    add(
        "--caption_chunks",
        type=int,
        metavar="N",
        help="Read prompts in N pieces, of 75 tokens for SDXL (default: 1), as in training.",
    )
    add(
        "--transparent",
        action="store_true",
        help="Take the flat ground of each picture away, from the border inwards: PNGs with alpha.",
    )
    add(
        "--batch_size",
        type=int,
        metavar="N",
        help="Pictures denoised together (default: 1). On the CPU it doesn't change a bit of them; on GPUs "
        "their last bits differ.",
    )
    add("--title", metavar="TEXT", help="Heading of the sheet.")
    add("--no_legend", action="store_true", help="Leave out the small print that tells what all share.")
    add("--strip", nargs="+", type=Path, metavar="PATH", help="Training images (files, folders) for the top.")
    add_measures(parser)
    add(
        "--pretrained_vae_model_name_or_path",
        metavar="VAE",
        help="Folder or hub name of a VAE to use in place of the base's, as in training.",
    )
    add("--device", help="Such as cuda or cpu (default: the accelerator at hand).")
    add("--dtype", choices=DTYPE_NAMES, help="Precision (default: fp32).")
    add("--manifest", type=Path, metavar="FILE", help="Draw the grid of a manifest again.")
    add("--output", type=Path, metavar="FOLDER", help="Where the pictures go.")
    return parser
