"""Pictures that move: one wiped over another, and frames as a GIF."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw


def wiped(left: Image.Image, right: Image.Image, share: float) -> Image.Image:
    """Two pictures of one size over each other, cut at one place.

    Args:
        left: Shown up to the cut.
        right: Shown from there on.
        share: Of the width, from 0 to 1: where the cut is.

    Raises:
        ValueError: Their sizes differ.
    """
    if left.size != right.size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (left.size, right.size))
        raise ValueError(f"pictures of {sizes} have no common cut; give two of one size")
    both, cut = right.convert("RGBA"), round(share * left.width)
    both.paste(left.convert("RGBA").crop((0, 0, cut, left.height)), (0, 0))
    if 0 < cut < left.width:
        ImageDraw.Draw(both).line((cut, 0, cut, left.height), fill="white")
    return both


def there_and_back(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames, then those between the last and the first, backwards: repeated, nothing jumps."""
    return [*frames, *frames[-2:0:-1]]


def gif(frames: Sequence[Image.Image], milliseconds: int) -> bytes:
    """An endless GIF of pictures of one size, each with 256 colours of its own.

    Args:
        frames: In order.
        milliseconds: That each is shown.
    """
    data = io.BytesIO()
    first, *rest = [frame.convert("RGB").quantize(dither=Image.Dither.NONE) for frame in frames]
    first.save(data, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, optimize=False)
    return data.getvalue()
