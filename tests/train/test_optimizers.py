"""Which parameters learn at which rate, with which optimizer, and that each of them can be resumed."""

import builtins
import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load, save

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.output.checkpoint import flatten_optimizer, optimizer_numbers, restore_optimizer
from flatlora_diffusion.train.optimizers import make_optimizer, parameter_groups
from tests.tiny import add_lora, assert_equal, build_text_encoders, build_unet, run, stop_after

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def adapted_models() -> dict[str, torch.nn.Module]:
    unet, (first, second) = build_unet(), build_text_encoders()
    unet.requires_grad_(False)
    add_lora(unet)
    for encoder in (first, second):
        encoder.requires_grad_(False)
        add_lora(encoder, ["q_proj", "v_proj"])
    return {"unet": unet, "text_encoder": first, "text_encoder_2": second}


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_each_part_has_its_rate_and_b_a_multiple_of_it(config, ratio):
    models = adapted_models()
    config = dataclasses.replace(
        config, learning_rate=1e-4, text_encoder_lr=2e-5, text_encoder_2_lr=3e-5, loraplus_lr_ratio=ratio
    )
    rates, decays = {}, {}
    for group in parameter_groups(models, config, lr_factor=2.0):
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)], decays[id(parameter)] = group["lr"], group["weight_decay"]
    expected = {"unet": 2e-4, "text_encoder": 2e-5, "text_encoder_2": 3e-5}
    count = 0
    for part, model in models.items():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert id(parameter) not in rates
                continue
            factor = ratio if ratio and "lora_B" in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * expected[part])
            assert decays[id(parameter)] == (1e-4 if part == "unet" else 1e-3)
            count += 1
    assert count == len(rates)


def test_the_second_text_encoder_has_the_rate_of_the_first_unless_told(config):
    config = dataclasses.replace(config, text_encoder_lr=2e-5)
    rates = {group["part"]: group["lr"] for group in parameter_groups(adapted_models(), config)}
    assert rates["text_encoder"] == rates["text_encoder_2"] == 2e-5
    silent = dataclasses.replace(config, text_encoder_2_lr=0.0)
    assert silent.second_text_encoder_lr == 0.0


def test_prodigy_has_one_rate(config):
    config = dataclasses.replace(config, optimizer="Prodigy", learning_rate=1.0)
    groups = parameter_groups(adapted_models(), config)
    assert {group["lr"] for group in groups} == {1.0}
    optimizer = make_optimizer(groups, config)
    assert type(optimizer).__name__ == "Prodigy"
    defaults = {name: optimizer.defaults[name] for name in ("decouple", "use_bias_correction", "beta3")}
    assert defaults == {"decouple": True, "use_bias_correction": True, "beta3": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True},
        {"loraplus_lr_ratio": 16.0, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        # Only parameters of 4096 elements and more have moments in 8 bits.
        pytest.param({"use_8bit_adam": True, "rank": 64}, marks=needs_bitsandbytes),
    ],
    ids=["prodigy", "LoRA+", "8-bit AdamW"],
)
def test_it_trains_and_goes_on_with_the_same_bits(config, tmp_path, changes):
    changes = {"max_train_steps": 4, **changes}
    whole = run(config, **changes)
    assert any(tensor.abs().sum() > 0 for name, tensor in whole.items() if "up" in name)

    parts = str(tmp_path / "parts")
    stop_after(config, 2, output_dir=parts, **changes)
    resumed = run(config, output_dir=parts, resume_from_checkpoint="latest", **changes)
    assert_equal(resumed, whole)


@needs_bitsandbytes
def test_8_bit_adamw_is_nearly_adamw_and_its_state_survives_bit_for_bit(config):
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 65), (64, 64), (4, 8)]  # the last keeps its moments in 32 bits

    def optimized(start, use_8bit_adam):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        changed = dataclasses.replace(config, use_8bit_adam=use_8bit_adam)
        return make_optimizer([{"params": parameters, "lr": 1e-2, "weight_decay": 0.1}], changed), parameters

    def step(optimizer, parameters, gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    def normals():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    start = normals()
    (short, ours), (long, reference) = optimized(start, True), optimized(start, False)
    for _ in range(4):
        gradients = normals()
        step(short, ours, gradients)
        step(long, reference, gradients)
    for one, other, first in zip(ours, reference, start, strict=True):
        assert (one - other).norm() / (other - first).norm() < 0.05
        assert one.numel() < 4096 or not torch.equal(one, other)

    tensors = flatten_optimizer(short)
    assert {tensors[f"{index}.state{k}"].dtype for index in (0, 1) for k in (1, 2)} == {torch.uint8}
    assert tensors["2.state1"].dtype == torch.float32
    tensors, numbers = load(save(tensors)), json.loads(json.dumps(optimizer_numbers(short)))
    again, theirs = optimized([p.detach() for p in ours], True)
    restore_optimizer(again, tensors, numbers)
    assert_equal(flatten_optimizer(again), tensors)
    assert optimizer_numbers(again) == numbers and numbers["state"]["0"] == {"step": 4}
    gradients = normals()
    step(short, ours, gradients)
    step(again, theirs, gradients)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("changes", "package", "flag"),
    [
        ({"use_8bit_adam": True}, "bitsandbytes", "--use_8bit_adam"),
        ({"optimizer": "prodigy"}, "prodigyopt", "--optimizer prodigy"),
    ],
)
def test_a_missing_package_is_named(config, monkeypatch, changes, package, flag):
    original = builtins.__import__

    def without(name, *arguments, **settings):
        if name == package:
            raise ImportError(name)
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{flag} needs the package {package}: pip install"):
        make_optimizer(
            [{"params": [torch.nn.Parameter(torch.ones(2))]}], dataclasses.replace(config, **changes)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 4.0}, "Prodigy has one learning rate for all"),
        ({"loraplus_lr_ratio": 0.0}, "--loraplus_lr_ratio 0.0: must be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)
