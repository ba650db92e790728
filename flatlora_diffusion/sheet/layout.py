"""Contact sheets: pictures of several methods side by side, one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from flatlora_diffusion.sheet.text import MUTED_INK, Text, fitted

MAX_PIXELS = 64_000_000

_CRISP_SIDE = 256  # small pictures are enlarged up to this side
_LARGEST_SIDE = 512  # large pictures are reduced to this side

_RULE = "#e5e5ea"
_PAPER = "#ffffff"

Label = str | Sequence[str]
"""Of a row or a column: a text, or several: those of its groups, the widest first, and its own."""

Size = tuple[int, int]
"""Width and height in pixels."""


def _displayed_size(size: Size, box: int) -> Size:
    """Size of a picture in a square box: reduced to fit, or enlarged by a whole factor to stay crisp."""
    longest = max(size)
    if longest <= box:
        return size[0] * (box // longest), size[1] * (box // longest)
    return max(1, round(size[0] * box / longest)), max(1, round(size[1] * box / longest))


def _displayed(image: Image.Image, size: Size) -> Image.Image:
    """The picture on white paper, at that size."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAPER), image)
    enlarged = size[0] >= image.width and size[1] >= image.height
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)


def _cell_side(sizes: Sequence[Size]) -> int:
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
    places: list[tuple[int, int, Size]] = field(default_factory=list)
    rules: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def border(self) -> int:
        return 2 * self.text_size

    @property
    def gap(self) -> int:
        return self.text_size // 2 + 2

    @property
    def size(self) -> Size:
        return self.content_width + 2 * self.border, self.y + self.border

    def add_text(self, text: Text) -> None:
        self.texts.append((self.border, self.y, "l", text))
        self.y += text.height

    def add_rule(self, space: int, left: int | None = None) -> None:
        right = self.border + self.content_width - 1
        self.rules.append((self.border if left is None else left, right, self.y + space))
        self.y += 2 * space + 1

    def add_place(self, size: Size, box: int, x: int, y: int, width: int, height: int) -> None:
        """Centre a picture, as large as in a square of side `box`, in a rectangle."""
        size = _displayed_size(size, box)
        self.places.append((x + (width - size[0]) // 2, y + (height - size[1]) // 2, size))

    def draw(self, images: Sequence[Image.Image]) -> Image.Image:
        sheet = Image.new("RGB", self.size, _PAPER)
        draw = ImageDraw.Draw(sheet)
        for left, right, y in self.rules:
            draw.line((left, y, right, y), fill=_RULE)
        for x, y, (width, height) in self.places:
            # A hairline around the picture: one on white must not dissolve into the paper.
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_RULE)
        for (x, y, size), image in zip(self.places, images, strict=True):
            sheet.paste(_displayed(image, size), (x, y))
        for x, y, anchor, text in self.texts:
            text.draw(draw, x, y, anchor)
        return sheet


def contact_sheet(
    cells: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[Label],
    rows: Sequence[Label],
    title: str | None = None,
    strip: Sequence[Image.Image] = (),
    strip_label: str | None = None,
    references: Sequence[Image.Image | None] = (),
    reference_label: str = "",
    cell_size: int | None = None,
    margin: int | None = None,
    footer: str | None = None,
) -> Image.Image:
    """Pictures in a labelled grid on white paper.

    Small pictures (up to 128 pixels) are enlarged by a whole factor without smoothing, large ones reduced to
    512 pixels; transparent ones lie on white.

    Args:
        cells: Rows of pictures, one picture for each column.
        columns: Label of each column: the methods, say. Neighbours whose labels begin with the same texts
            have these once, above them all.
        rows: Label of each row: the prompt and the seed, say. Wrapped to the width of the label column, which
            is left out where all labels are empty. Neighbours whose labels begin with the same texts have
            these once, beside them all.
        title: Heading of the sheet.
        strip: Thumbnails above the grid: the training pictures, say.
        strip_label: Heading of the thumbnails.
        references: What the pictures of each row should look like, in a last column: one for each row, or
            none at all. Where there is None, the place stays empty.
        reference_label: Heading of that column.
        cell_size: Side in pixels of the square that each picture must fit into; chosen from the pictures'
            sizes by default.
        margin: Least number of pixels between neighbours in the grid, without rules; labels that need more
            take it. By default it follows the text size, with rules between the groups of rows.
        footer: Small print below the grid; may have several lines.

    Returns:
        The sheet in mode RGB.

    Raises:
        ValueError: No pictures, rows of different lengths, labels that do not match the pictures, or a sheet
            of more than 64 million pixels.
    """
    layout = _arranged(
        [[image.size for image in row] for row in cells],
        [image.size for image in strip],
        [image and image.size for image in references],
        columns=columns,
        rows=rows,
        title=title,
        strip_label=strip_label,
        reference_label=reference_label,
        cell_size=cell_size,
        margin=margin,
        footer=footer,
    )
    shown = [*strip]
    for row, reference in zip(cells, references or [None] * len(cells), strict=True):
        shown += [*row, reference] if reference else row
    return layout.draw(shown)


def sheet_size(
    cells: Sequence[Sequence[Size]],
    *,
    strip: Sequence[Size] = (),
    references: Sequence[Size | None] = (),
    **settings: Any,
) -> Size:
    """Width and height of the sheet of pictures that needn't exist yet, of which the sizes are given.

    The other arguments, and the errors, are those of `contact_sheet`.
    """
    return _arranged(cells, strip, references, **settings).size


def _arranged(
    cells: Sequence[Sequence[Size]],
    strip: Sequence[Size],
    references: Sequence[Size | None],
    *,
    columns: Sequence[Label],
    rows: Sequence[Label],
    title: str | None = None,
    strip_label: str | None = None,
    reference_label: str = "",
    cell_size: int | None = None,
    margin: int | None = None,
    footer: str | None = None,
) -> _Layout:
    """Where all goes: the pictures of the strip first, then those of the cells row by row."""
    _check(cells, columns, rows, strip, references, cell_size, margin)
    box = cell_size or _cell_side([size for row in cells for size in row])
    grid: list[list[Size | None]] = [list(row) for row in cells]
    if references:
        grid = [[*row, reference] for row, reference in zip(grid, references, strict=True)]
        columns = [*columns, _beside(reference_label, columns)]
    sizes = [_displayed_size(size, box) for row in grid for size in row if size]
    cell_width, cell_height = (max(sides) for sides in zip(*sizes, strict=True))
    text_size = min(max(round(box * 0.055), 14), 28)
    layout = _Layout(text_size, content_width=0, y=2 * text_size)

    headings, labels = _levels(columns), _levels(rows)
    space = layout.gap if margin is None else margin
    apart = max(0, layout.gap - space)  # what keeps the headings of close columns from running together
    # A column is as wide as its picture, or as the longest word above it within reason.
    words = [
        math.ceil((Text(word, 8 * text_size, text_size).width + apart + space) / (stop - start)) - space
        for level in headings
        for start, stop, label in level
        for word in label.split()
    ]
    column_width = max(cell_width, *words, 4 * text_size)
    label_width = min(max(column_width, 12 * text_size), 16 * text_size)
    beside = [_fitted_labels(level, label_width, cell_height + space, text_size) for level in labels]
    x = layout.border
    label_lefts = []
    for texts in beside:
        label_lefts.append(x)
        width = max(text.width for text in texts)
        x += width + 3 * layout.gap if width else 0
    starts = {start for level in headings[:-1] for start, _, _ in level} - {0}
    starts |= {len(cells[0])} if references else set()
    lefts = []
    for column in range(len(columns)):
        x += 2 * layout.gap if margin is None and column in starts else 0
        lefts.append(x)
        x += column_width + space
    # A grid of one small picture still leaves room for its heading and its small print.
    layout.content_width = max(x - space - layout.border, 20 * text_size)

    if title and title.strip():
        layout.add_text(Text(title, layout.content_width, round(text_size * 1.6)))
        layout.y += text_size
    if strip:
        _lay_out_strip(layout, strip, strip_label, 64 if box < 384 else 128)
        layout.add_rule(text_size)

    limit = max(4 * text_size, cell_height // 2)
    for depth, level in enumerate(headings):
        spans = [(lefts[start], lefts[stop - 1] + column_width) for start, stop, _ in level]
        _lay_out_headings(layout, level, spans, apart, limit, is_last=depth == len(headings) - 1)

    tops, ends, bottoms = [], [], []
    for index, row in enumerate(grid):
        if index and margin is not None:
            layout.y += margin
        elif index:
            _separate(layout, labels, label_lefts, index)
        height = max(cell_height, beside[-1][index].height)
        for left, size in zip(lefts, row, strict=True):
            if size:
                layout.add_place(size, box, left, layout.y, column_width, height)
        tops.append(layout.y)
        layout.y += height
        ends.append(layout.y)
        for level, texts in zip(labels[:-1], beside[:-1], strict=True):
            for (start, stop, _), text in zip(level, texts, strict=True):
                if stop == index + 1:  # a group is at least as high as its label
                    layout.y = max(layout.y, tops[start] + text.height)
        bottoms.append(layout.y)
    for left, level, texts in zip(label_lefts, labels, beside, strict=True):
        last = ends if level is labels[-1] else bottoms
        for (start, stop, _), text in zip(level, texts, strict=True):
            layout.texts.append((left, (tops[start] + last[stop - 1] - text.height) // 2, "l", text))

    if footer and footer.strip():
        layout.add_rule(text_size)
        layout.add_text(Text(footer, layout.content_width, round(text_size * 0.85), MUTED_INK))

    width, height = layout.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the sheet would have {width} x {height} pixels, more than the limit of "
            f"{MAX_PIXELS // 10**6} million; use fewer pictures or a smaller cell_size"
        )
    return layout


def _beside(heading: str, labels: Sequence[Label]) -> Label:
    """The label of one more column, with as many texts as the others have."""
    return heading if isinstance(labels[0], str) else (*[""] * (len(labels[0]) - 1), heading)


_Level = list[tuple[int, int, str]]
"""The groups of one level of labels: the first row or column, the one after the last, the text."""


def _levels(labels: Sequence[Label]) -> list[_Level]:
    """The groups of each level, the widest groups first. At the last level each label stands for itself."""
    paths = [(label,) if isinstance(label, str) else tuple(label) for label in labels]
    levels: list[_Level] = []
    for depth in range(len(paths[0])):
        level: _Level = []
        for index, path in enumerate(paths):
            grouped = depth + 1 < len(path) and index and paths[index - 1][: depth + 1] == path[: depth + 1]
            start = level.pop()[0] if grouped else index
            level.append((start, index + 1, path[depth]))
        levels.append(level)
    return levels


def _fitted_labels(level: _Level, width: int, row_height: int, text_size: int) -> list[Text]:
    """The labels beside the rows, each no higher than its rows (or four lines)."""
    height = row_height * min(stop - start for start, stop, _ in level)
    return fitted([label for _, _, label in level], width, max(height, 4 * text_size), text_size)


def _lay_out_headings(
    layout: _Layout, level: _Level, spans: Sequence[tuple[int, int]], apart: int, limit: int, is_last: bool
) -> None:
    """Place a level of labels above its columns; a rule joins the columns of a group."""
    narrowest = min(right - left for left, right in spans) - apart
    texts = fitted([label for _, _, label in level], narrowest, limit, layout.text_size)
    height = max(text.height for text in texts)
    for (left, right), text in zip(spans, texts, strict=True):
        layout.texts.append(((left + right) // 2, layout.y + height - text.height, "m", text))
    layout.y += height
    if not is_last:
        layout.y += layout.gap // 2
        layout.rules += [(left, right - apart - 1, layout.y) for left, right in spans]
    layout.y += layout.gap if height else 0


def _separate(layout: _Layout, labels: Sequence[_Level], label_lefts: Sequence[int], index: int) -> None:
    """A rule above a row that begins a group, from the group's label on; a space above the others."""
    groups = labels[:-1] or labels
    for level, left in zip(groups, label_lefts, strict=False):
        if any(start == index for start, _, _ in level):
            layout.add_rule(layout.gap, left)
            return
    layout.y += layout.gap


def _lay_out_strip(layout: _Layout, strip: Sequence[Size], label: str | None, box: int) -> None:
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
    for index, size in enumerate(strip):
        x = layout.border + index % per_line * (box + gap)
        layout.add_place(size, box, x, layout.y + index // per_line * (box + gap), box, box)
    layout.y += lines * (box + gap) - gap


def _check(
    cells: Sequence[Sequence[Size]],
    columns: Sequence[Label],
    rows: Sequence[Label],
    strip: Sequence[Size],
    references: Sequence[Size | None],
    cell_size: int | None,
    margin: int | None,
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
    if references and len(references) != len(cells):
        raise ValueError(
            f"there are {len(references)} references for {len(cells)} rows of pictures; pass one for each row"
        )
    for what, labels in (("column", columns), ("row", rows)):
        if len({1 if isinstance(label, str) else len(label) for label in labels} | {0}) != 2:
            raise ValueError(f"the {what} labels have different numbers of texts; give each the same")
    sizes = [*strip, *filter(None, references), *(size for row in cells for size in row)]
    if any(0 in size for size in sizes):
        raise ValueError("a picture has no pixels; leave it out")
    if cell_size is not None and cell_size < 1:
        raise ValueError(f"{cell_size=} must be at least 1 pixel")
    if margin is not None and margin < 0:
        raise ValueError(f"{margin=} must be at least 0 pixels")
