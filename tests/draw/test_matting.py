"""Flat grounds taken away: against icons whose alpha is known."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.matting import matte
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import read
from flatlora_diffusion.grid.command import main
from flatlora_diffusion.grid.recipe import Recipe

ICONS = sorted((Path(__file__).parents[2] / "assets" / "icons-3d").glob("*.png"))
COLOUR = (200, 40, 90)


def disc(side: int = 96) -> Image.Image:
    """A soft disc with a hole."""
    large = Image.new("L", (8 * side, 8 * side))
    draw = ImageDraw.Draw(large)
    draw.ellipse((side, side, 7 * side, 6 * side), fill=255)
    draw.ellipse((3 * side, 3 * side, 4 * side, 4 * side), fill=0)
    icon = Image.new("RGBA", (side, side), (*COLOUR, 255))
    icon.putalpha(large.resize((side, side), Image.Resampling.BOX))
    return icon


def over(icon: Image.Image, colour: str | tuple[int, int, int]) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", icon.size, colour), icon).convert("RGB")


def alpha(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGBA").getchannel("A"), dtype=float) / 255


@pytest.mark.slow
@pytest.mark.parametrize("ground", ["white", "#20a040"])
@pytest.mark.parametrize("file", ICONS, ids=[file.stem for file in ICONS])
def test_the_alpha_of_icons_comes_back_from_a_flat_ground(file, ground):
    icon = Image.open(file).convert("RGBA")
    matted = matte(over(icon, ground))
    assert np.abs(alpha(matted) - alpha(icon)).mean() <= 0.03
    again = np.asarray(over(matted, ground), dtype=int) - np.asarray(over(icon, ground), dtype=int)
    assert np.abs(again).mean() < 1


@pytest.mark.parametrize("ground", ["white", "black", "#3060c0"])
def test_soft_edges_are_those_of_the_mixture_and_a_hole_inside_is_no_ground(ground):
    icon = disc()
    matted = matte(over(icon, ground))
    hole = alpha(icon).copy()
    hole[35:50, 35:50] = 1  # it doesn't hang together with the border
    contrast = np.abs(np.subtract(COLOUR, ImageColor.getrgb(ground))).max()
    assert np.abs(alpha(matted) - hole).max() <= 8.5 / contrast, "less is the ground's colour"
    edge = (alpha(icon) > 0.2) & (hole < 1)
    assert np.abs(np.asarray(matted)[edge][:, :3].astype(int) - COLOUR).max() <= 20, "no fringe of the ground"


def test_noise_in_the_ground_is_ground():
    noise = np.random.default_rng(0).normal(0, 2, (96, 96, 3))
    picture = np.clip(np.asarray(over(disc(), "#e0e0e0")) + noise, 0, 255).astype(np.uint8)
    found = alpha(matte(Image.fromarray(picture)))
    assert found[:8].max() == 0 and found[50:66, 40:60].min() == 1


@pytest.mark.parametrize("kind", ["gradient", "photo", "frame"])
def test_other_grounds_are_none(kind):
    if kind == "gradient":
        picture = Image.linear_gradient("L").convert("RGB")
    elif kind == "photo":
        picture = Image.effect_noise((96, 96), 80).convert("RGB").filter(ImageFilter.BoxBlur(3))
    else:  # corners alone have one colour
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).rounded_rectangle((0, 0, 95, 95), 12, fill="red")
    assert matte(picture) is None


@pytest.mark.slow
def test_a_grid_writes_alpha_says_so_and_is_drawn_again_from_its_manifest(
    base_path, tmp_path, monkeypatch, caplog
):
    found = iter([disc(16), None])
    monkeypatch.setattr("flatlora_diffusion.draw.pipeline.matte", lambda picture: next(found))
    words = ["--base", str(base_path), "--steps", "1", "--device", "cpu", "--prompt", "a icon", "--seed"]
    main([*words, "1", "2", "--transparent", "--output", str(tmp_path / "out")])
    one, two = (tmp_path / "out" / f"a_icon-seed{seed}-base.png" for seed in (1, 2))
    assert Image.open(one).tobytes() == disc(16).tobytes()
    whole = draw_with(load_pipeline(str(base_path)), None, "a icon", 2, Drawing(16, 16, steps=1))
    assert Image.open(two).tobytes() == whole.convert("RGBA").tobytes()
    assert 'the picture of "a icon" with seed 2 keeps its ground, which isn\'t flat' in caplog.text
    assert read(one).transparent and "Ground: transparent" in Image.open(one).info["parameters"]
    assert Recipe.load(tmp_path / "out").drawing.transparent
    kept = one.stat().st_mtime_ns
    main([*words, "1", "2", "--transparent", "--output", str(tmp_path / "out")])
    assert one.stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="has a grid with other transparent; give another folder"):
        main([*words, "1", "2", "--output", str(tmp_path / "out")])
