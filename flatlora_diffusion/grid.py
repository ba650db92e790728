"""Contact sheets from files: a manifest, or pictures named on the command line.

From a shell, for the folder that the generation step writes, or for any pictures in row-major order:

    python -m flatlora_diffusion.grid generated/ --output sheet.png
    python -m flatlora_diffusion.grid a.png b.png c.png d.png --columns base LoRA --output sheet.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from PIL import Image, ImageOps

from flatlora_diffusion.contact_sheet import contact_sheet

MANIFEST = "manifest.json"

_PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet: its label and the files of its pictures."""

    label: str
    images: Sequence[Path]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet as files and labels: what the generation step records in `manifest.json`.

    Args:
        columns: Label of each column.
        rows: Rows of picture files, each with its label.
        title: Heading of the sheet.
        footer: Small print.
        strip: Files of the training pictures.
        strip_label: Heading of the training pictures.
    """

    columns: Sequence[str]
    rows: Sequence[SheetRow]
    title: str | None = None
    footer: str | None = None
    strip: Sequence[Path] = ()
    strip_label: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> Sheet:
        """Read a manifest, given the file or the folder that holds it.

        It is a JSON object `{"columns": [...], "rows": [{"label": "...", "images": ["a.png", ...]}, ...]}`
        with `title`, `footer`, `strip` (files) and `strip_label` optional; files are relative to the
        manifest's folder. Other keys are left to those who wrote them.

        Raises:
            ValueError: The manifest is missing, not JSON, or not of this form.
        """
        path = Path(path)
        path = path / MANIFEST if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"cannot read {path} ({error.strerror}); pass a folder that holds {MANIFEST}, or pictures"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object")

        def strings(holder: dict, key: str, where: str = "") -> list[str]:
            value = holder.get(key, [])
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{path}: {where}{key}={value!r} must be a list of strings")
            return value

        def string(holder: dict, key: str, where: str = "") -> str | None:
            value = holder.get(key)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{path}: {where}{key}={value!r} must be a string")
            return value

        rows = content.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{path}: rows must be a list of {{"label": ..., "images": [...]}}')
        return cls(
            columns=strings(content, "columns"),
            rows=[
                SheetRow(
                    label=string(row, "label", f"rows[{index}].") or "",
                    images=[path.parent / name for name in strings(row, "images", f"rows[{index}].")],
                )
                for index, row in enumerate(rows)
            ],
            title=string(content, "title"),
            footer=string(content, "footer"),
            strip=[path.parent / name for name in strings(content, "strip")],
            strip_label=string(content, "strip_label"),
        )

    def draw(self) -> Image.Image:
        """Open the files and lay them out.

        Raises:
            ValueError: A file is missing or no picture, or the sheet is refused by `contact_sheet`.
        """
        return contact_sheet(
            [[_open(file) for file in row.images] for row in self.rows],
            columns=self.columns,
            rows=[row.label for row in self.rows],
            title=self.title,
            strip=[_open(file) for file in self.strip],
            strip_label=self.strip_label,
            footer=self.footer,
        )


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"the picture {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {path} cannot be read: {error}") from error


def _save_png(image: Image.Image, path: Path) -> None:
    """Write under another name first: an interrupted run leaves the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """Folders replaced by the pictures in them, in the order of their names."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURE_SUFFIXES)
        if not found:
            raise ValueError(f"the folder {path} holds no pictures ({', '.join(sorted(_PICTURE_SUFFIXES))})")
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
    if arguments.title is not None:
        sheet = replace(sheet, title=arguments.title)
    if arguments.strip:
        sheet = replace(sheet, strip=_expanded(arguments.strip), strip_label="training pictures")
    return sheet


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flatlora_diffusion.grid",
        usage="%(prog)s IMAGE [IMAGE ...] --columns NAME [NAME ...] --output FILE.png [options]\n"
        "       %(prog)s FOLDER --output FILE.png [options]",
        description="Lay pictures out in a labelled contact sheet.",
        epilog=f"A folder given instead of pictures must hold {MANIFEST}, as the generation step writes it.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="pictures, row by row from left to right; or one folder with a manifest",
    )
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="label of each column, e.g. base LoRA")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="label of each row, e.g. the prompts")
    parser.add_argument("--title", metavar="TEXT", help="heading of the sheet")
    parser.add_argument(
        "--strip",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="training pictures (files or folders) for the top",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="where the sheet goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for input that cannot be drawn."""
    options = _parser().parse_args(arguments)
    try:
        if options.output.suffix.lower() != ".png":
            raise ValueError(f"--output {options.output} must end in .png")
        if not options.output.parent.is_dir():
            raise ValueError(
                f"the folder {options.output.parent} of --output does not exist; create it first"
            )
        _save_png(_sheet_from_arguments(options).draw(), options.output)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
