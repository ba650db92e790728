"""Where and how much two pictures of the same size differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Mean difference of the channels, of 255, above which a pixel counts as changed: about three units of
# lightness (CIELAB) in a mid grey, which is just seen side by side.
VISIBLE = 8
# Colours of equal steps in lightness, more or less, from black to pale yellow (matplotlib's inferno).
_COLOURS = (
    *((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51)),
    *((249, 140, 10), (249, 201, 50), (252, 255, 164)),
)


@dataclass(frozen=True)
class Difference:
    """How two pictures differ.

    Attributes:
        picture: A map of their size: dark where they are equal, bright where they differ. The colour's place
            on the ramp is the square root of the mean absolute difference of red, green and blue, as a share
            of 255. It is the same for all pairs, so maps can be compared; a difference of 1 shows, and that
            from black to white alone has the last colour.
        mean_percent: Mean absolute difference of all values, in percent of the full range.
        changed_percent: Share of the pixels whose mean difference is more than `VISIBLE` of 255.
    """

    picture: Image.Image
    mean_percent: float
    changed_percent: float


def difference(one: Image.Image, other: Image.Image) -> Difference:
    """Compare two pictures pixel by pixel, as RGB.

    Raises:
        ValueError: Their sizes differ.
    """
    if one.size != other.size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (one.size, other.size))
        raise ValueError(f"pictures of {sizes} have no difference; give two of one size")
    left, right = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (one, other))
    sums = np.abs(left - right).sum(axis=2)  # of three channels, so that all stays whole: 0 to 765
    return Difference(
        picture=Image.fromarray(_ramp()[sums]),
        mean_percent=100 * float(sums.mean()) / 765,
        changed_percent=100 * float((sums > 3 * VISIBLE).mean()),
    )


def _ramp() -> np.ndarray:
    """The colours of the sums 0 to 765: (766, 3), uint8."""
    places = np.sqrt(np.arange(766) / 765)
    anchors = np.linspace(0, 1, len(_COLOURS))
    return (
        np.stack([np.interp(places, anchors, channel) for channel in np.transpose(_COLOURS)], axis=1)
        .round()
        .astype(np.uint8)
    )
