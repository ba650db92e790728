"""Merged weights that are shaken, beside a model in which the same is written into plain weights."""

import math

import pytest
import torch

from flatlora_diffusion.draw.active import activate
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.shaken import Shake, shaken, shaken_weight

DRAWING = Drawing(16, 16, 2, 3.0)


@pytest.fixture(scope="module")
def pipeline(base_path, written_adapters):
    pipeline = load_pipeline(str(base_path))
    for number, path in enumerate(written_adapters.values()):
        load_adapter(pipeline, f"adapter_{number}", path)
    return pipeline


def bits(pipeline):
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    return [tensor.clone() for part in parts for tensor in part.state_dict().values()]


def draw(pipeline, name, shake, scale=1.0):
    activate(pipeline, name, scale)
    with shaken(pipeline, name, shake):
        return draw_with(pipeline, name, "a icon", 5, DRAWING, scale).tobytes()


def test_noise_is_that_of_the_paper_and_the_same_for_all():
    weight = torch.randn(64, 4096) * torch.arange(1, 65)[:, None]
    found = shaken_weight(weight, "a", Shake(0.3)) - weight
    relative = found.norm(dim=1) / weight.norm(dim=1)
    assert torch.allclose(relative, torch.full_like(relative, 0.3), rtol=0.05)
    z = found * math.sqrt(4096) / (0.3 * weight.norm(dim=1, keepdim=True))
    other = torch.randn(64, 4096)
    same = (shaken_weight(other, "a", Shake(0.1)) - other) * math.sqrt(4096)
    assert torch.allclose(same / (0.1 * other.norm(dim=1, keepdim=True)), z, atol=1e-2)
    assert not torch.equal(shaken_weight(weight, "b", Shake(0.3)) - weight, found)
    assert not torch.equal(shaken_weight(weight, "a", Shake(0.3, draw=1)) - weight, found)
    assert torch.equal(shaken_weight(weight, "a", Shake()), weight)


def test_rounding_leaves_few_values_near_the_old_ones():
    weight = torch.randn(8, 16, 3, 3)
    weight[3] = 0
    found = shaken_weight(weight, "a", Shake(bits=3))
    assert found.shape == weight.shape and not found[3].any()
    for row, old in zip(found.flatten(1), weight.flatten(1), strict=True):
        assert len(row.unique()) <= 7
        assert (row - old).abs().max() <= old.abs().max() / 3 / 2 + 1e-6
    assert (shaken_weight(weight, "a", Shake(bits=8)) - weight).abs().max() < 0.02 * weight.abs().max()


@pytest.mark.slow
def test_pictures_are_those_of_shaken_merged_weights_and_every_bit_comes_back(pipeline):
    calm = {name: draw_with(pipeline, name, "a icon", 5, DRAWING).tobytes() for name in (None, "adapter_0")}
    before = bits(pipeline)
    for name in (None, "adapter_0"):
        # Merged, a picture has other last bits at most: all but a few values are the same.
        merged = draw(pipeline, name, Shake())
        far = [abs(one - other) for one, other in zip(merged, calm[name], strict=True)]
        assert max(far) <= 1
        noisy = draw(pipeline, name, Shake(0.3))
        assert noisy != calm[name] and noisy == draw(pipeline, name, Shake(0.3))
        assert draw(pipeline, name, Shake(0.3, draw=1)) != noisy
        assert draw(pipeline, name, Shake(bits=3)) != calm[name]
    assert all(torch.equal(*pair) for pair in zip(bits(pipeline), before, strict=True))
    assert draw_with(pipeline, "adapter_0", "a icon", 5, DRAWING).tobytes() == calm["adapter_0"]


def test_what_goes_wrong_in_between_leaves_the_bits_too(pipeline):
    before = bits(pipeline)
    activate(pipeline, "adapter_1", 0.5)
    with pytest.raises(RuntimeError, match="stop"), shaken(pipeline, "adapter_1", Shake(0.2)):
        name, layer = next(
            (name, module)
            for name, module in pipeline.unet.named_modules()
            if hasattr(module, "lora_A") and name.endswith("to_q")
        )
        assert layer.merged, name
        raise RuntimeError("stop")
    assert all(torch.equal(*pair) for pair in zip(bits(pipeline), before, strict=True))
    assert not any(getattr(module, "merged", False) for module in pipeline.unet.modules())


@pytest.mark.parametrize("wrong", [{"sigma": -0.1}, {"sigma": math.nan}, {"bits": 1}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Shake(**wrong)
