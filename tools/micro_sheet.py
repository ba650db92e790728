"""Sheets of drawings: icons above what was drawn for them, and numbered drawings without any words."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8
TEXT = 12  # pixels


def tile(pictures: Sequence[Image.Image], texts: Sequence[str], columns: int, size: int) -> Image.Image:
    """Pictures in rows, each with its text below, cut to the picture's width.

    Args:
        pictures: the pictures.
        texts: one for each picture.
        columns: pictures in a row.
        size: pixels a side of each.
    """
    rows = -(-len(pictures) // columns)
    cell = (size + GAP, size + TEXT + 2 * GAP)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = GAP + index % columns * cell[0], GAP + index // columns * cell[1]
        sheet.paste(picture.resize((size, size), Image.Resampling.LANCZOS), (left, top))
        while draw.textlength(text, font) > size:
            text = text[:-1]
        draw.text((left, top + size + GAP // 2), text, "#555555", font)
    return sheet
