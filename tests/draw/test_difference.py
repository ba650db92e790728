"""The difference map against closed forms."""

import itertools

import numpy as np
import pytest
from PIL import Image

from flatlora_diffusion.draw.difference import VISIBLE, difference


def grey(level, size=(4, 3)):
    return Image.new("RGB", size, (level,) * 3)


def lightness(colour):
    """L* of CIELAB of an sRGB colour, by its definition."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
    luminance = np.dot(linear, (0.2126, 0.7152, 0.0722))
    return 116 * luminance ** (1 / 3) - 16 if luminance > (6 / 29) ** 3 else luminance * (29 / 3) ** 3


def colours_of(met):
    return set(map(tuple, np.asarray(met.picture).reshape(-1, 3).tolist()))


def colour_of(level):
    (colour,) = colours_of(difference(grey(0), grey(level)))
    return colour


def noise(seed, size=(5, 7)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_equal_pictures_have_none():
    met = difference(noise(1), noise(1))
    assert (met.mean_percent, met.changed_percent) == (0, 0)
    assert colours_of(met) == {(0, 0, 4)}
    assert met.picture.size == (5, 7)


def test_black_and_white_have_all():
    met = difference(grey(0), grey(255))
    assert (met.mean_percent, met.changed_percent) == (100, 100)
    assert colours_of(met) == {(252, 255, 164)}


def test_the_figures_are_the_means_over_pixels_and_channels():
    one = grey(100, (10, 10))
    other = one.copy()
    other.putpixel((2, 3), (100, 0, 130))  # 0, 100 and 30 of 255
    met = difference(one, other)
    assert met.mean_percent == pytest.approx(100 * 130 / (255 * 3 * 100), rel=1e-12)
    assert met.changed_percent == 1.0
    changed = {
        place for place in itertools.product(range(10), range(10)) if met.picture.getpixel(place) != (0, 0, 4)
    }
    assert changed == {(2, 3)}


def test_which_picture_comes_first_does_not_matter_and_nothing_wraps_around():
    one, other = noise(1), noise(2)
    met, swapped = difference(one, other), difference(other, one)
    left, right = (np.asarray(picture, dtype=float) for picture in (one, other))
    assert met.mean_percent == swapped.mean_percent
    assert met.mean_percent == pytest.approx(100 * np.abs(left - right).mean() / 255, rel=1e-12)
    assert met.picture.tobytes() == swapped.picture.tobytes()


def test_the_visible_threshold_is_exclusive_and_on_the_mean_of_the_channels():
    base = grey(100)
    for colour, expected in (
        ((100 + VISIBLE,) * 3, 0),
        ((100 + VISIBLE, 100 + VISIBLE, 101 + VISIBLE), 100),
        ((100, 100, 100 - 3 * VISIBLE), 0),
        ((100, 100, 99 - 3 * VISIBLE), 100),
    ):
        assert difference(base, Image.new("RGB", base.size, colour)).changed_percent == expected


def test_the_map_gets_lighter_with_every_step_and_evenly_along_the_root():
    levels = np.array([lightness(colour_of(level)) for level in range(256)])
    assert (np.diff(levels) > 0).all()
    # From 0 to 98 of 100, never far from the straight line in the square root of the difference.
    line = levels[-1] * np.sqrt(np.arange(256) / 255)
    assert levels[0] < 1 and levels[-1] > 95
    assert np.abs(levels - line).max() < 6


def test_the_colour_of_a_difference_does_not_depend_on_the_pair():
    one, other = noise(3), noise(4)
    sums = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).sum(axis=2)
    met = np.asarray(difference(one, other).picture)
    for (y, x), total in np.ndenumerate(sums):
        if total % 3 == 0:
            assert tuple(met[y, x]) == colour_of(int(total) // 3)


def test_pictures_of_other_modes_count_as_rgb():
    met = difference(Image.new("L", (2, 2), 30), Image.new("RGBA", (2, 2), (40, 40, 40, 0)))
    assert met.mean_percent == pytest.approx(100 * 10 / 255)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="pictures of 4x3 and 3x4 have no difference"):
        difference(grey(0), grey(0, (3, 4)))
