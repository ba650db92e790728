"""Norms of the updates: against updates that are formed in full, in a run, and their limit."""

import copy
import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.rehearsal.known import numbers
from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data import images
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.sdxl import lora
from flatlora_diffusion.sdxl.initialise import initialise, subtract_initial_update
from flatlora_diffusion.train.update_norms import UpdateNorms
from tests.tiny import (
    TEXT_TARGETS,
    add_lora,
    assert_equal,
    build_text_encoders,
    build_unet,
    run,
    stop_after,
)


def layers_of(models: list[nn.Module]) -> list[LoraLayer]:
    return [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]


def full_norms(models: list[nn.Module]) -> torch.Tensor:
    """Of the updates as PEFT forms them to merge them."""
    updates = [sum(layer.get_delta_weight(name) for name in layer.lora_A) for layer in layers_of(models)]
    return torch.stack([update.detach().norm() for update in updates])


@pytest.fixture
def models() -> list[nn.Module]:
    models = [build_unet(), *build_text_encoders()]
    for model, targets in zip(
        models, (["to_q", "to_k", "conv1", "ff.net.2"], *[TEXT_TARGETS] * 2), strict=True
    ):
        model.requires_grad_(False)
        add_lora(model, targets, use_rslora=model is models[1], r=3 if model is models[2] else 4)
    return models


def test_they_are_those_of_the_updates_in_full(models):
    norms = UpdateNorms(models).measure()
    assert norms.shape == (len(layers_of(models)),) and norms.min() > 0.1
    torch.testing.assert_close(norms, full_norms(models), rtol=1e-5, atol=0)


def test_models_may_be_on_two_devices(models):
    """Where text encoders are trained no further, they go to the CPU. Fake tensors know where they are."""
    devices = ("meta", "cpu", "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):  # a list of indices is none
        for model, device in zip(models, devices, strict=True):
            for layer in layers_of([model]):
                for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                    factor.weight = nn.Parameter(torch.empty(factor.weight.shape, device=device))
        norms = UpdateNorms(models).measure()
    assert norms.shape == (len(layers_of(models)),) and norms.device.type == "meta"


def test_the_limit_reaches_both_devices(monkeypatch):
    """The norms, with numbers, are on the device of the UNet."""
    models = [build_unet(), build_text_encoders()[0]]
    for model, targets in zip(models, (["to_q"], TEXT_TARGETS), strict=True):
        model.requires_grad_(False)
        add_lora(model, targets)
    there, before = copy.deepcopy(models), UpdateNorms(models).measure()
    greatest = before.median().item()
    norms, scaled = UpdateNorms(models).limit(greatest)
    assert 0 < scaled < len(norms)
    with FakeTensorMode(allow_non_fake_inputs=True), numbers():
        for layer in layers_of(there[:1]):
            for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                factor.weight = nn.Parameter(factor.weight.detach().to("meta"))
        monkeypatch.setattr(UpdateNorms, "measure", lambda _: before.to("meta"))
        found, count = UpdateNorms(there).limit(greatest)
        assert found.device.type == "meta" and count == scaled
        assert found.tolist() == pytest.approx(norms.tolist())
    for one, other in zip(layers_of(models[1:]), layers_of(there[1:]), strict=True):
        for factor in ("lora_A", "lora_B"):
            here, moved = (getattr(layer, factor)["default"].weight for layer in (one, other))
            torch.testing.assert_close(here, moved)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_a_frozen_adapter_takes_away_does_not_count(kind):
    unet = build_unet()
    unet.requires_grad_(False)
    models = {"unet": unet}
    lora.add_lora(models, rank=4, alpha=6, seed=0, init_lora_weights=True)
    initialise(models, kind, seed=0, batch_size=1, loss=lambda _: torch.zeros(()))
    subtract_initial_update(models)
    norms = UpdateNorms([unet])
    assert not norms.measure().any()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-4, 0.3):  # also where the difference of the products would be lost in rounding
        for layer in layers_of([unet]):
            for factor in (layer.lora_A, layer.lora_B):
                weight = factor["default"].weight.data
                weight += size * torch.randn(weight.shape, generator=generator)
        exact = full_norms([copy.deepcopy(unet).double()])
        torch.testing.assert_close(norms.measure().double(), exact, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_limit_scales_both_factors_of_the_layers_above_it(models):
    before = copy.deepcopy(models)
    norms = UpdateNorms(models)
    greatest = norms.measure().median().item()
    flat = FlatLoRA(models, sigma=0.5, total_steps=10, schedule="constant")
    name = next(iter(flat.layers))
    stale = flat.row_std(name)
    limited, scaled = norms.limit(greatest)
    assert 0.4 < scaled / len(limited) < 0.6
    torch.testing.assert_close(limited, full_norms(models), rtol=1e-5, atol=0)
    assert limited.max().item() == pytest.approx(greatest)
    changed = 0
    for layer, old, norm in zip(layers_of(models), layers_of(before), full_norms(before), strict=True):
        factor = min(1.0, (greatest / norm.item()) ** 0.5)
        for now, then in ((layer.lora_A, old.lora_A), (layer.lora_B, old.lora_B)):
            if norm <= greatest:
                assert torch.equal(now["default"].weight, then["default"].weight)
            torch.testing.assert_close(now["default"].weight, factor * then["default"].weight)
        changed += factor < 1
    assert changed == scaled
    # The noise follows the weights, without a step in between.
    fresh = FlatLoRA(copy.deepcopy(before), sigma=0.5, total_steps=10, schedule="constant")
    flat_norms = torch.cat([flat.row_std(n) for n in flat.layers])
    assert not torch.equal(flat_norms, torch.cat([fresh.row_std(n) for n in fresh.layers]))
    flat.remove()
    anew = FlatLoRA(models, sigma=0.5, total_steps=10, schedule="constant")
    torch.testing.assert_close(flat_norms, torch.cat([anew.row_std(n) for n in anew.layers]))
    assert stale.shape == anew.row_std(name).shape


def kohyas_limit(self: UpdateNorms, greatest: float) -> tuple[torch.Tensor, int]:
    """The same as kohya's scripts do it: with every update in full."""
    norms, scaled = [], 0
    for layer in self._layers:
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        norm = (b @ a * layer.scaling["default"]).norm().clamp(min=greatest / 2)
        ratio = norm.clamp(max=greatest) / norm
        if ratio != 1:
            a *= ratio**0.5
            b *= ratio**0.5
            scaled += 1
        norms.append((b @ a * layer.scaling["default"]).norm())
    return torch.stack(norms), scaled


@pytest.mark.slow
def test_a_run_is_limited_as_in_kohyas_scripts(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, scale_weight_norms=0.05, learning_rate=1e-2, lora_alpha=6.0)
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    limited = run(config)
    norms = file_norms(config)
    assert norms.max() < 0.05 * (1 + 1e-5) and (norms > 0.05 * (1 - 1e-5)).sum() > len(norms) / 2
    assert [set(values) - {"loss", "sigma", "lr"} for values in logged] == 6 * [
        {"update_norm", "max_norm/keys_scaled", "max_norm/max_key_norm"}
    ]
    assert logged[-1]["update_norm"] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert logged[-1]["max_norm/max_key_norm"] == pytest.approx(0.05)
    assert logged[-1]["max_norm/keys_scaled"] >= (norms > 0.05 * (1 - 1e-5)).sum() - 1

    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    stop_after(resumed, 3)
    assert_equal(run(resumed, resume_from_checkpoint="latest"), limited)

    monkeypatch.setattr(UpdateNorms, "limit", kohyas_limit)
    for name, tensor in run(config, output_dir=str(tmp_path / "kohya")).items():
        torch.testing.assert_close(tensor, limited[name], rtol=1e-3, atol=1e-4)


def file_norms(config) -> torch.Tensor:
    """The updates' norms of a run's file."""
    tensors = load_file(images.Path(config.output_dir, WEIGHTS_NAME))
    names = [name.removesuffix(".down.weight") for name in tensors if name.endswith(".down.weight")]
    pairs = [(tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"]) for name in names]
    return torch.stack([(config.alpha / len(a) * b @ a).norm() for a, b in pairs])


@pytest.mark.slow
def test_the_mean_is_in_the_summary_and_the_tracker(config, monkeypatch, caplog):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    run(config, report_to="tensorboard")
    expected = file_norms(config).mean().item()
    assert expected > 0
    assert len(logged) == 6 and logged[-1]["update_norm"] == pytest.approx(expected, rel=1e-5)
    assert summary_norm(config) == pytest.approx(expected, rel=1e-5)
    assert "no effect" not in caplog.text


@pytest.mark.slow
def test_an_adapter_without_effect_is_told(config, caplog):
    run(config, learning_rate=0.0, max_train_steps=2)
    told = [record.message for record in caplog.records if "no effect" in record.message]
    assert told == ["the adapter has no effect: every update B@A is exactly 0; raise --learning_rate"]
    assert summary_norm(config) == 0


def summary_norm(config) -> float:
    return json.loads(images.Path(config.output_dir, "summary.json").read_text())["mean_update_norm"]


def test_a_limit_of_0_and_one_with_dora_are_refused(config):
    with pytest.raises(UserError, match=r"^--scale_weight_norms 0\.0: must be greater than 0$"):
        dataclasses.replace(config, scale_weight_norms=0.0)
    with pytest.raises(UserError, match=r"^--scale_weight_norms with --use_dora: .*leave out one of"):
        dataclasses.replace(config, scale_weight_norms=1.0, use_dora=True)
