"""Contact sheets: pictures of several methods side by side, one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from flatlora_diffusion.typeset import MUTED_INK, Text, fitted

MAX_PIXELS = 64_000_000

_CRISP_SIDE = 192  # small pictures are enlarged up to this side
_LARGEST_SIDE = 512  # large pictures are reduced to this side

_RULE = "#e5e5ea"
_PAPER = "#ffffff"


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
    texts: list[tuple[int, int, str, Text]] = field(default_factory=list)
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

    def add_text(self, text: Text) -> None:
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
    words = [Text(word, 8 * text_size, text_size).width for label in columns for word in label.split()]
    column_width = max(cell_width, *words, 4 * text_size)
    headings = fitted(columns, column_width, 4 * text_size, text_size)
    label_limit = min(max(column_width, 12 * text_size), 16 * text_size)
    labels = fitted(rows, label_limit, max(cell_height, 4 * text_size), text_size)
    label_width = max(label.width for label in labels)
    label_width += 3 * layout.gap if label_width else 0
    grid_width = label_width + len(columns) * (column_width + layout.gap) - layout.gap
    # A grid of one small picture still leaves room for its heading and its small print.
    layout.content_width = max(grid_width, 20 * text_size)
    lefts = [layout.margin + label_width + i * (column_width + layout.gap) for i in range(len(columns))]

    if title and title.strip():
        layout.add_text(Text(title, layout.content_width, round(text_size * 1.6)))
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
        layout.add_text(Text(footer, layout.content_width, round(text_size * 0.85), MUTED_INK))

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
        layout.add_text(Text(label, layout.content_width, layout.text_size, MUTED_INK))
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
