"""Icons on a transparent ground: the flat ground of a picture taken away, from the border inwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_Floats = NDArray[np.float32]
_Mask = NDArray[np.bool_]

_TOLERANCE = 8.0  # of 255, in the channel that differs most: what still is the colour of the ground
_FLAT_SHARE = 0.5  # of the border's pixels that have it at least, where the ground is flat
_CORNER = 32  # a corner is this part of the shorter side
_BAND = 3  # pixels from the ground inwards that may be partly ground


def matte(picture: Image.Image) -> Image.Image | None:
    """The picture in RGBA, with the flat ground that touches its border taken away.

    The ground's colour `g` is that of the corners. What has this colour, and hangs together with the border,
    is ground; an area of the same colour inside the icon is none. Pixels near the ground may be mixed with
    it: where the icon has the colour `f` a little further inside, the mixture `c = a f + (1 - a) g` has
    `a = <c - g, f - g> / |f - g|^2`, within [0, 1]. They get the colour of which that mixture is made, so
    that the result over `g` is the picture again.

    Args:
        picture: On one colour, such as white.

    Returns:
        None where the ground isn't flat: corners of different colours, or a border that has others.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _ground(pixels)
    if ground is None:
        return None
    outside = _reached(_distance(pixels, ground) <= _TOLERANCE)
    inside = ~outside
    for _ in range(_BAND):
        inside &= ~_beside(~inside)
    colours, known = _spread(pixels, inside, ~outside, 2 * _BAND)
    band = known & ~inside
    towards = colours[band] - ground
    share = ((pixels[band] - ground) * towards).sum(axis=1) / np.maximum((towards**2).sum(axis=1), 1e-6)
    alpha = (~outside).astype(np.float32)
    alpha[band] = share.clip(0, 1)
    own = ground + (pixels - ground) / np.maximum(alpha, 1 / 255)[..., None]
    rgba = np.dstack([np.where(outside[..., None], ground, own), 255 * alpha])
    return Image.fromarray(rgba.round().clip(0, 255).astype(np.uint8))


def _ground(pixels: _Floats) -> _Floats | None:
    """The colour of all four corners, where most of the border has it too."""
    size = max(1, min(pixels.shape[:2]) // _CORNER)
    ends = (slice(None, size), slice(-size, None))
    corners = np.stack([np.median(pixels[rows, columns], axis=(0, 1)) for rows in ends for columns in ends])
    ground = np.median(corners, axis=0)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    same = _distance(border, ground) <= _TOLERANCE
    flat = (_distance(corners, ground) <= _TOLERANCE).all() and same.mean() >= _FLAT_SHARE
    return ground if flat else None


def _distance(pixels: _Floats, colour: _Floats) -> _Floats:
    """The difference of the channel that differs most."""
    return np.abs(pixels - colour).max(axis=-1)


def _beside(mask: _Mask) -> _Mask:
    """The pixels of a mask and their eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _reached(ways: _Mask) -> _Mask:
    """The pixels of a mask to which a path inside it leads from the border, by sides."""
    reached = ways.copy()
    reached[1:-1, 1:-1] = False
    count = -1
    while count != (count := np.count_nonzero(reached)):
        for turn in (np.asarray, np.flipud, np.transpose, lambda mask: np.flipud(mask.T)):
            along, over = turn(reached), turn(ways)  # views
            for row in range(1, len(along)):
                along[row] |= along[row - 1] & over[row]
    return reached


def _spread(pixels: _Floats, known: _Mask, wanted: _Mask, steps: int) -> tuple[_Floats, _Mask]:
    """Colours of known pixels for wanted ones near them: step by step the mean of what neighbours have."""
    width = known.shape[1] + 2
    around = [down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1)]
    known = np.pad(known, 1)
    wanted = np.pad(wanted, 1)
    colours = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    flat, have = colours.reshape(-1, 3), known.reshape(-1)  # views
    for _ in range(steps):
        new = np.flatnonzero(wanted & ~known & _beside(known))
        neighbours = new[:, None] + around
        weights = have[neighbours].astype(np.float32)
        flat[new] = (flat[neighbours] * weights[..., None]).sum(axis=1) / weights.sum(axis=1)[:, None]
        have[new] = True
    return colours[1:-1, 1:-1], known[1:-1, 1:-1]
