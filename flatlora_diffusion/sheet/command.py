"""The command line of contact sheets, for the folder of a grid or for any pictures in row-major order.

python -m flatlora_diffusion.sheet pictures/ --output sheet.png
python -m flatlora_diffusion.sheet a.png b.png c.png d.png --columns base LoRA --output sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flatlora_diffusion.common.command import OneLineParser, invoked_as
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import has_picture_name, save_picture
from flatlora_diffusion.sheet.files import MANIFEST, STRIP_LABEL, Sheet, SheetRow


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Folders replaced by the pictures in them, in the order of their names.

    Raises:
        ValueError: A folder holds no pictures.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if has_picture_name(file))
        if not found:
            raise ValueError(f"the folder {path} holds no pictures")
        files += found
    return files


def _sheet_from_arguments(arguments: argparse.Namespace) -> Sheet:
    images, columns, labels = arguments.images, arguments.columns, arguments.rows
    if len(images) == 1 and images[0].is_dir():
        if columns or labels:
            raise ValueError(
                f"{images[0] / MANIFEST} names the columns and rows; leave --columns and --rows out"
            )
        sheet = Sheet.load(images[0])
    else:
        if not columns:
            raise ValueError(
                "--columns is missing; name each column, or pass one folder that holds a manifest"
            )
        width = len(columns)
        if len(images) % width:
            raise ValueError(
                f"{len(images)} pictures do not fill rows of {width} columns; pass {width} for each row"
            )
        if labels and len(labels) != len(images) // width:
            raise ValueError(
                f"--rows has {len(labels)} labels for {len(images) // width} rows of pictures; pass one each"
            )
        labels = labels or [""] * (len(images) // width)
        rows = [SheetRow(label, images[i * width : (i + 1) * width]) for i, label in enumerate(labels)]
        sheet = Sheet(columns=columns, rows=rows)
    for name in ("title", "cell_size", "margin"):
        if getattr(arguments, name) is not None:
            sheet = replace(sheet, **{name: getattr(arguments, name)})
    if arguments.strip:
        sheet = replace(sheet, strip=expanded(arguments.strip), strip_label=STRIP_LABEL)
    return sheet


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=invoked_as("python -m flatlora_diffusion.sheet"),
        usage="%(prog)s IMAGE [IMAGE ...] --columns NAME [NAME ...] --output FILE.png [options]\n"
        "       %(prog)s FOLDER --output FILE.png [options]",
        description="Lay pictures out in a labelled contact sheet.",
        epilog=f"A folder given instead of pictures must hold {MANIFEST}, as flatlora_diffusion.grid has it.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="Pictures, row by row from left to right; or one folder with a manifest.",
    )
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="Label of each column, e.g. base LoRA.")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="Label of each row, e.g. the prompts.")
    parser.add_argument("--title", metavar="TEXT", help="Heading of the sheet.")
    parser.add_argument(
        "--strip",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="Training pictures (files or folders) for the top.",
    )
    add_measures(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.png", help="Where the sheet goes."
    )
    return parser


def add_measures(parser: OneLineParser) -> None:
    """The flags for what is measured in pixels, in this command and in others that make sheets."""
    parser.add_argument(
        "--cell_size",
        type=int,
        metavar="PIXELS",
        help="Side of the square that each picture must fit into (default: small pictures are enlarged by "
        "whole factors up to 256 pixels, large ones reduced to 512).",
    )
    parser.add_argument(
        "--margin",
        type=int,
        metavar="PIXELS",
        help="Least space between neighbouring pictures (default: spaces and rules that follow the text).",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: a contact sheet of pictures that are there.

    Raises:
        UserError: The input cannot be drawn.
    """
    options = _parser().parse_all(arguments)
    try:
        if options.output.suffix.lower() != ".png":
            raise ValueError(f"--output {options.output} must end in .png")
        if not options.output.parent.is_dir():
            raise ValueError(
                f"the folder {options.output.parent} of --output does not exist; create it first"
            )
        save_picture(_sheet_from_arguments(options).draw(), options.output)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
