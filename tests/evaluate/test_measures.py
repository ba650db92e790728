"""Losses at fixed noise, merged weights, and flatness, against closed forms and the trainer's own figures."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.draw.active import activate
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.evaluate.denoising import Band, DenoisingSet, embed
from flatlora_diffusion.evaluate.flatness import (
    expected_rise,
    filter_normalised,
    landscape_line,
    landscape_plane,
    top_eigenvalue,
)
from flatlora_diffusion.evaluate.merged import adapted_layers, filter_norms, filters, merged_unet, replaced
from flatlora_diffusion.train.arms import train
from tests.tiny import global_rng_state, unet_inputs


@pytest.fixture
def pipeline(base_path):
    return load_pipeline(str(base_path))


def answer(unet: nn.Module) -> torch.Tensor:
    inputs = unet_inputs()
    conditions = inputs.pop("added_cond_kwargs")
    inputs = {name: value.to(unet.dtype) for name, value in inputs.items()}
    conditions["text_embeds"] = conditions["text_embeds"].to(unet.dtype)
    with torch.no_grad():
        return unet(**inputs, added_cond_kwargs=conditions, return_dict=False)[0]


# Losses.


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "text_encoder_lr": 1e-2}])
def test_the_loss_of_an_adapter_is_the_one_that_its_training_logged(config, pipeline, tmp_path, changes):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for index, colour in enumerate(("red", "green", "navy")):
        Image.new("RGB", (20, 20 + 8 * index), colour).save(heldout / f"{index}.png")
    config = dataclasses.replace(config, heldout_data_dir=str(heldout), learning_rate=1e-2, **changes)
    train(config)
    logged = json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_losses"]["6"]
    shown = DenoisingSet(pipeline, find_samples(heldout, config.instance_prompt), 16, 8)
    base = shown.losses(merged_unet(pipeline, None), embed(pipeline, None, shown.captions))
    load_adapter(pipeline, "lora", tmp_path / "run")
    unet = merged_unet(pipeline, "lora")
    losses = shown.losses(unet, embed(pipeline, "lora", shown.captions))
    assert losses.shape == (3, 8)
    assert losses.mean().item() == pytest.approx(logged, rel=1e-5)
    assert base.mean().item() != pytest.approx(logged, rel=1e-3)
    assert pipeline.vae.dtype == torch.float32


def test_bands_are_equal_parts_of_the_schedule_with_all_timesteps(pipeline, icons):
    shown = DenoisingSet(pipeline, find_samples(icons, "a icon"), 16, 8)
    bands = shown.bands(4)
    assert [band for band, _ in bands] == [Band(0, 250), Band(250, 500), Band(500, 750), Band(750, 1000)]
    assert [columns for _, columns in bands] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shown.timesteps[2] >= 250 > shown.timesteps[1]


# Merged weights.


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_merged_unet_computes_what_the_adapter_does(pipeline, adapters, scale):
    pipeline.unet.double()  # random weights are so rough a landscape that float32's rounding shows
    base = answer(pipeline.unet)
    for label, path in adapters.items():
        load_adapter(pipeline, label.replace("-", "_"), path)
    pipeline.unet.double()
    merged = merged_unet(pipeline, "Flat_LoRA", scale)
    activate(pipeline, "Flat_LoRA", scale)
    assert (answer(pipeline.unet) - base).abs().max() > 1e-2
    torch.testing.assert_close(answer(merged), answer(pipeline.unet), rtol=0, atol=1e-9)
    torch.testing.assert_close(answer(merged_unet(pipeline, None)), base, rtol=0, atol=1e-12)
    names = adapted_layers(pipeline.unet, ["Flat_LoRA"])
    assert names and all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in names)
    assert set(names) < set(filters(merged)) and adapted_layers(merged, ["Flat_LoRA"]) == []


def test_replaced_weights_come_back_after_an_exception(pipeline):
    unet = merged_unet(pipeline, None)
    own = unet.conv_in.weight.data
    before = own.clone()
    with pytest.raises(KeyError), replaced(unet, {"conv_in": torch.zeros_like(own)}):
        assert not unet.conv_in.weight.any()
        raise KeyError
    assert unet.conv_in.weight.data_ptr() == own.data_ptr() and torch.equal(own, before)


# Flatness, on losses whose answers are known.


class Quadratic(nn.Module):
    """`|W1 - T1|^2 / 2 + |W2 - T2|^2 / 2 + slope * sum(W1)` of a linear layer and a convolution."""

    def __init__(self, offset: float = 0.0, slope: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear, self.conv = nn.Linear(6, 5, bias=False), nn.Conv2d(3, 4, 3, bias=False)
        self.slope = slope
        self.targets = []
        for layer in (self.linear, self.conv):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=generator))
            self.targets.append(layer.weight.detach() - offset)
        self.requires_grad_(False)

    def loss(self) -> torch.Tensor:
        weights = self.linear.weight, self.conv.weight
        squares = [(w - t).square().sum() / 2 for w, t in zip(weights, self.targets, strict=True)]
        return sum(squares) + self.slope * self.linear.weight.sum()

    @property
    def norm_squared(self) -> float:
        return sum(layer.weight.square().sum().item() for layer in (self.linear, self.conv))


LAYERS = ["linear", "conv"]


def loss_of(model: Quadratic) -> float:
    return model.loss().item()


def test_the_expected_rise_of_a_quadratic_is_half_the_variance_of_the_noise():
    # eps has the variance sigma^2 |W_i|^2 / n in each of the n entries of a filter: sigma^2 |W|^2 in all.
    model = Quadratic(offset=1.0, slope=3.0)
    rng = global_rng_state()
    small, large = expected_rise(loss_of, model, LAYERS, [0.1, 0.2], draws=200)
    assert global_rng_state() == rng
    assert small.sigma == 0.1
    expected = 0.1**2 * model.norm_squared / 2
    assert abs(small.rise - expected) < 4 * small.standard_error + 1e-4 * expected
    assert 0.05 * expected / math.sqrt(200) < small.standard_error < 0.3 * expected / math.sqrt(200)
    assert large.rise == pytest.approx(4 * small.rise, rel=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_the_rise_of_a_loss_that_is_not_finite_is_not_either(broken):
    losses = iter([1.0, *[broken] * 8])
    rises = expected_rise(lambda model: next(losses), Quadratic(), LAYERS, [0.1, 0.2], draws=2)
    assert len(rises) == 2 and not any(math.isfinite(rise.rise) for rise in rises)


def test_nothing_is_said_of_no_layers():
    with pytest.raises(ValueError, match="no layers"):
        expected_rise(loss_of, Quadratic(), [], [0.1], draws=2)
    with pytest.raises(ValueError, match="no layers"):
        top_eigenvalue(lambda model: [], Quadratic(), [])


def test_only_the_named_layers_are_perturbed():
    model = Quadratic()
    one = expected_rise(loss_of, model, ["linear"], [0.1], draws=200)[0]
    assert one.rise == pytest.approx(0.01 * model.linear.weight.square().sum().item() / 2, rel=0.1)


def test_filters_of_a_direction_are_as_long_as_the_weights():
    model = Quadratic()
    directions = {name: filter_normalised(model, name, 0, 0) for name in LAYERS}
    for name, direction in directions.items():
        weight = model.get_submodule(name).weight
        assert direction.shape == weight.shape
        torch.testing.assert_close(filter_norms(direction), filter_norms(weight))
    assert not torch.equal(filter_normalised(model, "linear", 0, 1), directions["linear"])


def test_landscapes_of_a_quadratic_are_parabolas():
    model = Quadratic()
    alphas = [-0.5, 0.0, 0.25]
    lines = landscape_line(loss_of, model, LAYERS, alphas, directions=2)
    for line in lines:  # |d| = |W|, whatever the direction
        assert line == pytest.approx([alpha**2 * model.norm_squared / 2 for alpha in alphas], rel=1e-4)
    plane = landscape_plane(loss_of, model, LAYERS, alphas)
    one, two = ([filter_normalised(model, name, 0, index) for name in LAYERS] for index in range(2))
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(alphas):
            squares = [(alpha * a + beta * b).square().sum() for a, b in zip(one, two, strict=True)]
            assert plane[i][j] == pytest.approx(sum(squares).item() / 2, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    "eigenvalues", [(4.0, 1.0, -2.0, 0.5), (1.5, 0.5, -6.0, 0.1), (-1.0, -2.0, -3.0, -4.0)]
)
def test_the_top_eigenvalue_of_a_quadratic_form(eigenvalues):
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    hessian = (basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.T).double()
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double().requires_grad_(False)

    def losses(model):
        w = model[0].weight.flatten()
        yield 0.25 * (w @ hessian @ w)
        yield 0.25 * (w @ hessian @ w)

    value = top_eigenvalue(losses, model, ["0"], iterations=4, tolerance=1e-6)
    assert value == pytest.approx(max(eigenvalues), rel=1e-6)
    assert not model[0].weight.requires_grad
    assert top_eigenvalue(losses, model, ["0"], iterations=2, tolerance=1e-6) is None


def test_an_eigenvalue_of_a_loss_that_is_not_finite_is_not_told():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
    assert top_eigenvalue(lambda m: [m[0].weight.square().sum() * math.inf], model, ["0"]) is None


def test_the_error_of_an_eigenvalue_is_within_the_tolerance():
    """Of many that lie close together, under a negative one a thousand times as large."""
    eigenvalues = torch.cat([torch.linspace(-1, 2, 255), torch.tensor([-2000.0])]).double()
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double().requires_grad_(False)

    def losses(model):
        return [0.5 * (eigenvalues * model[0].weight.flatten().square()).sum()]

    for tolerance in (1e-1, 1e-2, 1e-4):
        value = top_eigenvalue(losses, model, ["0"], iterations=300, tolerance=tolerance)
        assert 2 * (1 - tolerance) <= value <= 2 * (1 + 1e-9)


def test_the_top_eigenvalue_of_a_network_is_that_of_its_whole_hessian():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 2, generator=generator)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sizes = [model[0].weight.numel(), model[2].weight.numel()]

    def by_vector(vector):
        one, two = vector.split(sizes)
        hidden = torch.tanh(F.linear(x, one.view(4, 3), model[0].bias))
        return F.mse_loss(F.linear(hidden, two.view(2, 4), model[2].bias), y)

    weights = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    hessian = torch.autograd.functional.hessian(by_vector, weights)
    value = top_eigenvalue(lambda m: [F.mse_loss(m(x), y)], model, ["0", "2"], tolerance=1e-4)
    assert value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


@pytest.mark.slow
def test_flatness_of_a_unet_leaves_it_as_it_was(pipeline, icons):
    shown = DenoisingSet(pipeline, find_samples(icons, "a icon")[:1], 16, 2)
    prompts = embed(pipeline, None, shown.captions)
    unet = merged_unet(pipeline, None)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    names = [name for name in filters(unet) if name.endswith("to_k")]

    def loss(unet):
        return shown.losses(unet, prompts).mean().item()

    rng = global_rng_state()
    assert expected_rise(loss, unet, names, [0.5], draws=2)[0].rise != 0
    middle = landscape_line(loss, unet, filters(unet), [0.0, 0.5], directions=1)[0]
    assert middle[0] == loss(unet) != middle[1]
    parts = [shown.batch_losses(unet, prompts, batch).mean() for batch in shown.batches()]
    assert not any(part.requires_grad for part in parts)

    def losses(unet):
        return (shown.batch_losses(unet, prompts, batch).mean() for batch in shown.batches())

    assert top_eigenvalue(losses, unet, names) is not None
    assert global_rng_state() == rng
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
