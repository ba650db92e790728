"""Pictures that move."""

import io

import pytest
from PIL import Image

from flatlora_diffusion.sheet.animation import gif, there_and_back, wiped

RED, BLUE = Image.new("RGB", (10, 4), "red"), Image.new("RGB", (10, 4), "blue")


def test_a_wipe_shows_the_left_picture_up_to_the_cut():
    both = wiped(RED, BLUE, 0.5).convert("RGB")
    assert [both.getpixel((x, 1)) for x in (0, 4, 5, 6, 9)] == [
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (0, 0, 255),
    ]
    assert wiped(RED, BLUE, 0).convert("RGB").tobytes() == BLUE.tobytes()
    assert wiped(RED, BLUE, 1).convert("RGB").tobytes() == RED.tobytes()
    with pytest.raises(ValueError, match="10x4 and 4x4"):
        wiped(RED, Image.new("RGB", (4, 4)), 0.5)


def test_a_gif_has_all_frames_and_repeats():
    frames = there_and_back([RED, wiped(RED, BLUE, 0.5), BLUE])
    assert len(frames) == 4
    with Image.open(io.BytesIO(gif(frames, 90))) as moving:
        assert moving.n_frames == 4 and moving.info["loop"] == 0 and moving.info["duration"] == 90
        moving.seek(2)
        assert moving.convert("RGB").getpixel((0, 0)) == (0, 0, 255)
