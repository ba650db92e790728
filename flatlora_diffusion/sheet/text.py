"""Text for pictures: wrapped, balanced and shortened to fit, in Pillow's built-in font."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

INK = "#1d1d1f"
MUTED_INK = "#6e6e73"

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


class Text:
    """Lines of text wrapped to a width, measured before anything is drawn.

    Args:
        text: Newlines are kept; runs of other white space count as one space.
        width: Pixels that no line exceeds (unless a single character does).
        size: Font size in pixels.
        colour: Of the ink.
    """

    def __init__(self, text: str, width: int, size: int, colour: str = INK) -> None:
        self.font = _font(size)
        self.line_height = round(size * 1.35)
        self.colour = colour
        self._limit = width
        self._paragraphs = [part for part in _drawable(text).strip().splitlines() if part.strip()]
        self.lines = [line for part in self._paragraphs for line in _wrap(part, self.font, width)]

    @property
    def height(self) -> int:
        """Pixels of all lines together."""
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


def fitted(texts: Sequence[str], width: int, height: int, size: int) -> list[Text]:
    """The texts in one font size: the largest in which all fit, at least three quarters of `size`.

    Texts that do not fit even so are shortened.
    """
    smallest = size * 3 // 4
    sizes = range(size, smallest, -1)
    chosen = next(
        (own for own in sizes if all(Text(t, width, own).height <= height for t in texts)), smallest
    )
    fitted = [Text(text, width, chosen) for text in texts]
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


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


@functools.lru_cache(maxsize=1024)  # the labels of a grid repeat, and the measuring is slow
def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> tuple[str, ...]:
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
    return (*lines, line)


def _wrap_evenly(text: str, font: ImageFont.FreeTypeFont, width: int) -> tuple[str, ...]:
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
