"""What of a comparison can be taken home beside the ZIP: both sides on one picture, and sliding as a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flatlora_diffusion.common.pictures import png_bytes
from flatlora_diffusion.grid.plan import unique_slugs
from flatlora_diffusion.sheet.animation import gif, there_and_back, wiped
from flatlora_diffusion.sheet.layout import contact_sheet

if TYPE_CHECKING:
    from flatlora_diffusion.app.comparison import Comparison

_CUTS = 13  # from one edge to the other
_MILLISECONDS = 90
_LARGEST = 512  # pixels a side, in what moves


def keepsakes(comparison: Comparison, left: str, right: str) -> tuple[Path, Path]:
    """The PNG and the GIF of two sides, made where they aren't yet.

    Args:
        comparison: Has both methods; the files go beside its pictures.
        left: Method on the left side.
        right: That on the right.
    """
    asked, folder = comparison.asked, comparison.archive.parent
    names = "-".join(unique_slugs([left, right]))
    still, moving = (folder / f"{names}-seed{asked.seed}-both.{kind}" for kind in ("png", "gif"))
    if still.is_file() and moving.is_file():
        return still, moving
    with Image.open(comparison.files[left]) as one, Image.open(comparison.files[right]) as other:
        sides = [one.copy(), other.copy()]
    footer = f"seed {asked.seed}, {asked.drawing.steps} steps, scale {asked.scale:g}"
    sheet = contact_sheet([sides], columns=[left, right], rows=[""], title=asked.prompt, footer=footer)
    still.write_bytes(png_bytes(sheet))
    for side in sides:
        side.thumbnail((_LARGEST, _LARGEST))
    cuts = [wiped(*sides, share=number / (_CUTS - 1)) for number in range(_CUTS)]
    heading = f"{left} | {right}"
    frames = [contact_sheet([[cut]], columns=[heading], rows=[""], title=asked.prompt) for cut in cuts]
    moving.write_bytes(gif(there_and_back(frames[::-1]), _MILLISECONDS))
    return still, moving
