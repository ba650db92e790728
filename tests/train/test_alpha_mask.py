"""--alpha_mask: the loss weighted by the alpha of the icons."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data.images import Framing, Sample, find_samples, variants
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.sdxl.encoding import Latents, PromptEmbeds
from flatlora_diffusion.sdxl.loss import diffusion_losses
from tests.sdxl.test_loss import Fixed
from tests.tiny import assert_equal, run, stop_after


def latents_of(pixels: torch.Tensor) -> Latents:
    mean = torch.zeros(1, 4, *(side // 8 for side in pixels.shape[-2:]))
    return Latents(mean, mean)


def cache(samples: list[Sample], weight: float | None, **framing) -> LatentCache:
    return LatentCache(
        samples, latents_of, Framing(resolution=32, **framing), 0, 1000, background_weight=weight
    )


def icon(folder: Path, name: str, box: tuple[int, int, int, int], opacity: int = 255) -> Sample:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((255, 0, 0, opacity), box)
    picture.save(folder / name)
    return Sample(folder / name, "a icon")


@pytest.mark.parametrize("background", [0.0, 0.25, 1.0])
def test_a_place_weighs_the_mean_alpha_of_its_pixels(tmp_path, background):
    samples = [icon(tmp_path, "a.png", (0, 0, 12, 8)), icon(tmp_path, "b.png", (8, 8, 32, 32), 51)]
    expected = torch.zeros(2, 1, 4, 4)
    expected[0, 0, 0, :2] = torch.tensor([1, 0.5])
    expected[1, 0, 1:, 1:] = 0.2
    expected = background + (1 - background) * expected
    shown = list(cache(samples, background).fixed_batches([5, 7]))
    for batch, own in zip(shown, expected, strict=True):
        torch.testing.assert_close(batch.weights, own.expand(2, 1, 4, 4))
    joined = shown[0].joined(shown[1])
    assert torch.equal(torch.cat([b.weights for b in joined.singles()]), joined.weights)
    assert cache(samples, None).batch([0]).weights is None
    mirrored = cache(samples[:1], background, random_flip=True).batch(range(20)).weights
    assert {tuple(w.flatten()[:4].tolist()) for w in mirrored} == {
        tuple(row.tolist()) for row in (expected[0, 0, 0], expected[0, 0, 0].flip(0))
    }


def test_the_alpha_is_cropped_and_resized_as_the_picture_is(tmp_path):
    picture = Image.new("RGBA", (90, 60), (0, 0, 0, 255))
    alpha = Image.linear_gradient("L").rotate(90).resize((90, 60))
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    framing = Framing(resolution=16, random_flip=True)  # black over white: the picture is 1 - alpha
    shown = list(variants(Sample(tmp_path / "a.png", ""), framing, seed=0))
    assert len(shown) == 8
    for variant in shown:
        assert ((1 - variant.pixels[0]) / 2 - variant.alpha).abs().max() <= 1.5 / 255


def test_the_loss_is_the_weighted_mean_of_the_squared_errors():
    draw = torch.Generator().manual_seed(0)
    latents, noise, predicted = (torch.randn(3, 2, 4, 4, generator=draw) for _ in range(3))
    weights = torch.rand(3, 1, 4, 4, generator=draw)
    weights[2] = 0.3
    known = (DDPMScheduler(), latents, noise, torch.tensor([1, 500, 900]))
    prompts = PromptEmbeds(torch.zeros(3, 3, 5), torch.zeros(3, 6))
    plain, weighted = (
        diffusion_losses(Fixed(predicted), *known, prompts, torch.zeros(3, 6), weights=w)
        for w in (None, weights)
    )
    squares = (predicted - noise).square().mean(dim=1, keepdim=True)
    expected = (weights * squares).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    torch.testing.assert_close(weighted, expected)
    assert weighted[2] == pytest.approx(plain[2].item(), rel=1e-6) and weighted[0] != plain[0]
    ones = torch.ones_like(weights)
    same = diffusion_losses(Fixed(predicted), *known, prompts, torch.zeros(3, 6), weights=ones)
    assert torch.equal(same, plain)


@pytest.mark.slow
def test_it_counts_and_a_stopped_run_ends_in_the_same_bits(config, icons, tmp_path):
    config = dataclasses.replace(config, alpha_mask=True, alpha_background_weight=0.1, max_train_steps=3)
    more = {
        "with_prior_preservation": True,
        "class_data_dir": str(icons),
        "class_prompt": "icon",
        "num_class_images": 4,
        "heldout_data_dir": str(icons),
    }
    whole = run(config, **more)
    assert "| loss weighted by alpha | ground 0.1 |" in (tmp_path / "run" / "README.md").read_text()
    again = {"output_dir": str(tmp_path / "again"), **more}
    stop_after(config, 1, **again)
    assert_equal(whole, run(config, resume_from_checkpoint="latest", **again))
    logged = [
        json.loads((Path(folder) / "summary.json").read_text())["heldout_losses"]
        for folder in (tmp_path / "run", tmp_path / "again")
    ]
    assert logged[0] == logged[1]
    plain = run(config, alpha_mask=False, alpha_background_weight=0, output_dir=str(tmp_path / "p"), **more)
    assert any(not torch.equal(plain[name], whole[name]) for name in whole)


def test_what_cannot_be_weighed_is_named_before_anything_is_written(config, tmp_path):
    folder = tmp_path / "opaque"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    with pytest.raises(UserError, match="--alpha_mask: no training image has transparent parts; leave it"):
        run(config, alpha_mask=True, instance_data_dir=str(folder))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--alpha_background_weight is for --alpha_mask"):
        dataclasses.replace(config, alpha_background_weight=0.5)
    icon(folder, "b.png", (0, 0, 0, 0))
    samples = find_samples(folder, "a icon")
    with pytest.raises(UserError, match=r"b\.png: nothing is opaque where it is cropped"):
        cache(samples, 0.0)
    assert cache(samples, 0.5).batch([0, 1]).weights is not None
