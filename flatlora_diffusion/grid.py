"""Contact sheets: pictures of several methods side by side, one row per prompt.

From a shell, for the folder that the generation step writes, or for any pictures in row-major order:

    python -m flatlora_diffusion.grid generated/ --output sheet.png
    python -m flatlora_diffusion.grid a.png b.png c.png d.png --columns base LoRA --output sheet.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from PIL import Image, ImageDraw, ImageFont, ImageOps

MANIFEST = "manifest.json"
MAX_PIXELS = 64_000_000

_CRISP_SIDE = 192  # small pictures are enlarged up to this side
_LARGEST_SIDE = 512  # large pictures are reduced to this side
_PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}

_INK = "#1d1d1f"
_MUTED_INK = "#6e6e73"
_RULE = "#e5e5ea"
_PAPER = "#ffffff"

# The built-in font has ASCII and little more; accents are dropped, and these are spelled out.
_SPELLED_OUT = str.maketrans(
    {
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{BULLET}": "\N{MIDDLE DOT}",
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{GREEK SMALL LETTER SIGMA}": "sigma",
    }
)
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


class _Text:
    """Lines of text wrapped to a width, measured before anything is drawn.

    Args:
        text: Newlines are kept; runs of other white space count as one space.
        width: Pixels that no line exceeds (unless a single character does).
        size: Font size in pixels.
        colour: Of the ink.
    """

    def __init__(self, text: str, width: int, size: int, colour: str = _INK) -> None:
        self.font = ImageFont.load_default(size)
        self.line_height = round(size * 1.35)
        self.colour = colour
        self._limit = width
        self._paragraphs = [part for part in _drawable(text).strip().splitlines() if part.strip()]
        self.lines = [line for part in self._paragraphs for line in _wrap(part, self.font, width)]

    @property
    def height(self) -> int:
        return self.line_height * len(self.lines)

    @property
    def width(self) -> int:
        """Pixels of the longest line."""
        return max((math.ceil(self.font.getlength(line)) for line in self.lines), default=0)

    def shorten(self, height: int) -> None:
        """Leave out the lines that do not fit, all but the first, and end in an ellipsis instead."""
        kept = max(1, height // self.line_height)
        if kept < len(self.lines):
            last = self.lines[kept - 1]
            while last and self.font.getlength(last + _ELLIPSIS) > self._limit:
                last = last[:-1].rstrip()
            self.lines[kept - 1 :] = [last + _ELLIPSIS]

    def balance(self) -> None:
        """Give the lines about the same length, in the same number: no word is left alone on the last."""
        self.lines = [
            line for part in self._paragraphs for line in _wrap_evenly(part, self.font, self._limit)
        ]

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int, anchor: str) -> None:
        """Draw with the top at `y`; `x` is the left edge (anchor `l`) or the middle (anchor `m`)."""
        ascent, descent = self.font.getmetrics()
        baseline = y + (self.line_height - ascent - descent) // 2 + ascent
        for index, line in enumerate(self.lines):
            position = (x, baseline + index * self.line_height)
            draw.text(position, line, fill=self.colour, font=self.font, anchor=f"{anchor}s")


def _fitted(texts: Sequence[str], width: int, height: int, size: int) -> list[_Text]:
    """The texts in one font size: the largest in which all fit, at least three quarters of `size`.

    Texts that do not fit even so are shortened.
    """
    for smaller in range(size, size * 3 // 4 - 1, -1):
        fitted = [_Text(text, width, smaller) for text in texts]
        if all(text.height <= height for text in fitted):
            break
    for text in fitted:
        if text.height <= height:
            text.balance()
        else:
            text.shorten(height)
    return fitted


def _drawable(text: str) -> str:
    """The text in characters that the built-in font has, as far as that is possible."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_SPELLED_OUT).replace(_ELLIPSIS, "..."))
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Each line as full as it goes; a word that is too long alone is broken anywhere."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line]


def _wrap_evenly(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """As few lines as possible, of about the same length."""
    lines = _wrap(text, font, width)
    narrowest = max(math.ceil(font.getlength(word)) for word in text.split())
    while narrowest < width:  # bisection for the least width that needs no more lines
        middle = (narrowest + width) // 2
        candidate = _wrap(text, font, middle)
        if len(candidate) > len(lines):
            narrowest = middle + 1
        else:
            lines, width = candidate, middle
    return lines


def _displayed_size(size: tuple[int, int], box: int) -> tuple[int, int]:
    """Size of a picture in a square box: reduced to fit, or enlarged by a whole factor to stay crisp."""
    longest = max(size)
    if longest <= box:
        return size[0] * (box // longest), size[1] * (box // longest)
    return max(1, round(size[0] * box / longest)), max(1, round(size[1] * box / longest))


def _displayed(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture on white paper, at that size."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAPER), image)
    enlarged = size[0] >= image.width and size[1] >= image.height
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)


def _cell_side(sizes: Sequence[tuple[int, int]]) -> int:
    """Side of the square that every cell's picture must fit into, where the caller names none."""
    longest = min(max(map(max, sizes)), _LARGEST_SIDE)
    return longest * max(1, _CRISP_SIDE // longest)


@dataclass
class _Layout:
    """What goes where, decided in full before a pixel is drawn; it grows downwards.

    All measures follow the text size, and that the pictures' size, so that sheets of small and of large
    pictures look alike.
    """

    text_size: int
    content_width: int
    y: int
    texts: list[tuple[int, int, str, _Text]] = field(default_factory=list)
    pictures: list[tuple[int, int, tuple[int, int], Image.Image]] = field(default_factory=list)
    rules: list[int] = field(default_factory=list)

    @property
    def margin(self) -> int:
        return 2 * self.text_size

    @property
    def gap(self) -> int:
        return self.text_size // 2 + 2

    @property
    def size(self) -> tuple[int, int]:
        return self.content_width + 2 * self.margin, self.y + self.margin

    def add_text(self, text: _Text) -> None:
        self.texts.append((self.margin, self.y, "l", text))
        self.y += text.height

    def add_rule(self, space: int) -> None:
        self.rules.append(self.y + space)
        self.y += 2 * space + 1

    def add_picture(self, image: Image.Image, box: int, x: int, y: int, width: int, height: int) -> None:
        """Centre the picture, as large as in a square of side `box`, in a rectangle."""
        size = _displayed_size(image.size, box)
        self.pictures.append((x + (width - size[0]) // 2, y + (height - size[1]) // 2, size, image))

    def draw(self) -> Image.Image:
        sheet = Image.new("RGB", self.size, _PAPER)
        draw = ImageDraw.Draw(sheet)
        for y in self.rules:
            draw.line((self.margin, y, self.margin + self.content_width - 1, y), fill=_RULE)
        for x, y, size, image in self.pictures:
            # A hairline around the picture: one on white must not dissolve into the paper.
            draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_RULE)
            sheet.paste(_displayed(image, size), (x, y))
        for x, y, anchor, text in self.texts:
            text.draw(draw, x, y, anchor)
        return sheet


def contact_sheet(
    cells: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str | None = None,
    strip: Sequence[Image.Image] = (),
    strip_label: str | None = None,
    cell_size: int | None = None,
    footer: str | None = None,
) -> Image.Image:
    """Pictures in a labelled grid on white paper.

    Small pictures (up to 96 pixels) are enlarged by a whole factor without smoothing, large ones reduced to
    512 pixels; transparent ones lie on white.

    Args:
        cells: Rows of pictures, one picture for each column.
        columns: Label of each column: the methods, say.
        rows: Label of each row: the prompt and the seed, say. Wrapped to the width of the label column, which
            is left out where all labels are empty.
        title: Heading of the sheet.
        strip: Thumbnails above the grid: the training pictures, say.
        strip_label: Heading of the thumbnails.
        cell_size: Side in pixels of the square that each picture must fit into; chosen from the pictures'
            sizes by default.
        footer: Small print below the grid; may have several lines.

    Returns:
        The sheet in mode RGB.

    Raises:
        ValueError: No pictures, rows of different lengths, labels that do not match the pictures, or a sheet
            of more than 64 million pixels.
    """
    _check(cells, columns, rows, strip, cell_size)
    box = cell_size or _cell_side([image.size for row in cells for image in row])
    sizes = [_displayed_size(image.size, box) for row in cells for image in row]
    cell_width, cell_height = (max(sides) for sides in zip(*sizes, strict=True))

    text_size = min(max(round(box * 0.055), 14), 28)
    layout = _Layout(text_size, content_width=0, y=2 * text_size)
    # A column is as wide as its picture, or as the longest word above it within reason.
    words = [_Text(word, 8 * text_size, text_size).width for label in columns for word in label.split()]
    column_width = max(cell_width, *words, 4 * text_size)
    headings = _fitted(columns, column_width, 4 * text_size, text_size)
    label_limit = min(max(column_width, 12 * text_size), 16 * text_size)
    labels = _fitted(rows, label_limit, max(cell_height, 4 * text_size), text_size)
    label_width = max(label.width for label in labels)
    label_width += 3 * layout.gap if label_width else 0
    grid_width = label_width + len(columns) * (column_width + layout.gap) - layout.gap
    # A grid of one small picture still leaves room for its heading and its small print.
    layout.content_width = max(grid_width, 20 * text_size)
    lefts = [layout.margin + label_width + i * (column_width + layout.gap) for i in range(len(columns))]

    if title and title.strip():
        layout.add_text(_Text(title, layout.content_width, round(text_size * 1.6)))
        layout.y += text_size
    if strip:
        _lay_out_strip(layout, strip, strip_label, 64 if box < 384 else 128)
        layout.add_rule(text_size)

    heading_height = max(heading.height for heading in headings)
    for left, heading in zip(lefts, headings, strict=True):
        top = layout.y + heading_height - heading.height
        layout.texts.append((left + column_width // 2, top, "m", heading))
    layout.y += heading_height + (layout.gap if heading_height else 0)

    for index, (label, row) in enumerate(zip(labels, cells, strict=True)):
        if index:
            layout.add_rule(layout.gap)
        height = max(cell_height, label.height)
        layout.texts.append((layout.margin, layout.y + (height - label.height) // 2, "l", label))
        for left, image in zip(lefts, row, strict=True):
            layout.add_picture(image, box, left, layout.y, column_width, height)
        layout.y += height

    if footer and footer.strip():
        layout.add_rule(text_size)
        layout.add_text(_Text(footer, layout.content_width, round(text_size * 0.85), _MUTED_INK))

    width, height = layout.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the sheet would have {width} x {height} pixels, more than the limit of "
            f"{MAX_PIXELS // 10**6} million; use fewer pictures or a smaller cell_size"
        )
    return layout.draw()


def _lay_out_strip(layout: _Layout, strip: Sequence[Image.Image], label: str | None, box: int) -> None:
    """Place the thumbnails in as few lines as possible, of about the same length.

    `box` is their side: a power of two, so that icons of common sizes are shown pixel for pixel or reduced by
    a whole factor.
    """
    if label and label.strip():
        layout.add_text(_Text(label, layout.content_width, layout.text_size, _MUTED_INK))
        layout.y += layout.text_size // 3
    gap = box // 8
    lines = math.ceil(len(strip) / ((layout.content_width + gap) // (box + gap)))
    per_line = math.ceil(len(strip) / lines)
    for index, image in enumerate(strip):
        x = layout.margin + index % per_line * (box + gap)
        layout.add_picture(image, box, x, layout.y + index // per_line * (box + gap), box, box)
    layout.y += lines * (box + gap) - gap


def _check(
    cells: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    rows: Sequence[str],
    strip: Sequence[Image.Image],
    cell_size: int | None,
) -> None:
    if not cells or not cells[0]:
        raise ValueError("there are no pictures; pass at least one row with one picture")
    for number, row in enumerate(cells, start=1):
        if len(row) != len(cells[0]):
            raise ValueError(
                f"row {number} has {len(row)} pictures, but row 1 has {len(cells[0])}; "
                "every row needs one picture for each column"
            )
    if len(columns) != len(cells[0]):
        raise ValueError(
            f"there are {len(columns)} column labels for {len(cells[0])} columns of pictures; "
            "pass one label for each column"
        )
    if len(rows) != len(cells):
        raise ValueError(
            f"there are {len(rows)} row labels for {len(cells)} rows of pictures; pass one label for each row"
        )
    if any(0 in image.size for image in [*strip, *(image for row in cells for image in row)]):
        raise ValueError("a picture has no pixels; leave it out")
    if cell_size is not None and cell_size < 1:
        raise ValueError(f"{cell_size=} must be at least 1 pixel")


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
