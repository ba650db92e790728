"""The rivals of the benchmark: gradients against twins written out by hand, and what they leave behind."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from benchmarks import rivals, sam
from benchmarks.t_lora import active_ranks, timestep_ranks
from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.sdxl.lora import add_lora
from flatlora_diffusion.train import arms
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from tests.tiny import (
    assert_equal,
    build_text_encoders,
    build_unet,
    global_rng_state,
    run,
    unet_inputs,
)

RHO = 0.3


@pytest.fixture
def config(config):
    return dataclasses.replace(config, max_train_steps=2, train_batch_size=1, flat_sigma=0.0)


def train_rival(config, output, rival, rho=RHO, **changes) -> dict[str, torch.Tensor]:
    config = dataclasses.replace(config, output_dir=f"{config.output_dir}-{output}", **changes)
    rivals.train(config, rival, rho)
    return load_file(f"{config.output_dir}/{WEIGHTS_NAME}")


def in_a_step(config, check) -> None:
    """Call `check(run, compute)` in the place of a step's backward pass, with A and B far from zero."""
    called = []

    class Check(Callback):
        def backward(self, run, compute):
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in trained(run):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            check(run, compute)
            called.append(run)
            return torch.tensor(0.0)

    run(config, max_train_steps=1, callbacks=[Check()])
    assert len(called) == 1


def trained(run) -> list[torch.Tensor]:
    return [p for model in run.models.values() for p in model.parameters() if p.requires_grad]


def layers(models) -> dict[str, LoraLayer]:
    return {
        f"{part}.{name}": module
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def gradients(compute, tensors) -> list[torch.Tensor]:
    """Of the step's loss; zeros for what it doesn't depend on. There are none afterwards."""
    compute()
    found = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def norm(tensors) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def assert_gradients(parameters, expected):
    for parameter, gradient in zip(parameters, expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert norm([found - gradient]) <= 1e-4 * norm([gradient])


@pytest.mark.slow
def test_lora_sam_has_the_gradient_at_the_ascended_adapter(config):
    def check(run, compute):
        parameters = trained(run)
        own = [p.detach().clone() for p in parameters]
        first = gradients(compute, parameters)
        with torch.no_grad():
            for p, value, gradient in zip(parameters, own, first, strict=True):
                p.copy_(value + RHO * gradient / norm(first))
        there = compute()
        for p in parameters:
            p.grad = None
        expected = gradients(compute, parameters)
        with torch.no_grad():
            for p, value in zip(parameters, own, strict=True):
                p.copy_(value)

        loss = rivals.Sam(RHO, on_merged=False).backward(run, compute)
        torch.testing.assert_close(loss, there)  # what is told is the loss of the ascended weights
        assert_gradients(parameters, expected)
        assert all(torch.equal(p, value) for p, value in zip(parameters, own, strict=True))
        assert norm([a - b for a, b in zip(expected, first, strict=True)]) > 1e-2 * norm(first)

    in_a_step(config, check)


@pytest.mark.slow
def test_sam_has_the_gradient_at_the_ascended_merged_weight(config):
    """The twin has no adapter: its weights are W', its gradients come to A and B by the chain rule."""

    def check(run, compute):
        models = run.models
        frozen = {n: p.detach().clone() for m in models.values() for n, p in m.named_parameters()}
        rivals.Sam(RHO, on_merged=True).backward(run, compute)
        assert all(
            torch.equal(p, frozen[n]) and (p.grad is None or p.requires_grad)
            for m in models.values()
            for n, p in m.named_parameters()
        )
        own = layers(models)
        found = {name: factors(layer) for name, layer in own.items()}
        found = {name: [(p.detach().clone(), p.grad) for p in pair] for name, pair in found.items()}
        weights = {}
        for name, layer in own.items():  # the models become the twin
            layer.merge()
            weights[name] = layer.get_base_layer().weight.requires_grad_(True)
        first = gradients(compute, list(weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), first, strict=True):
                weight.add_(RHO * gradient / norm(first))
        second = dict(zip(weights, gradients(compute, list(weights.values())), strict=True))
        for name, ((a, of_a), (b, of_b)) in found.items():
            scale = own[name].scaling["default"]
            expected = [scale * b.T @ second[name], scale * second[name] @ a.T]
            for gradient, wanted in zip((of_a, of_b), expected, strict=True):
                gradient = torch.zeros_like(wanted) if gradient is None else gradient
                assert norm([gradient - wanted]) <= 1e-4 * norm([wanted])

    in_a_step(dataclasses.replace(config, train_text_encoder=True), check)


def factors(layer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.slow
@pytest.mark.parametrize("on_merged", [False, True], ids=["A and B", "merged"])
def test_the_ascent_raises_the_loss_by_rho_times_the_gradients_norm(config, on_merged):
    rho = 1e-3

    def check(run, compute):
        perturbed = trained(run)
        if on_merged:
            perturbed = [layer.get_base_layer().weight for layer in layers(run.models).values()]
        with sam.given_gradients(perturbed):
            before = compute().item()
        length = norm([t.grad for t in perturbed])
        with sam.ascended(perturbed, rho):
            assert all(t.grad is None for t in perturbed)
            rise = compute().item() - before
        assert rise == pytest.approx(rho * length, rel=0.03)
        assert compute().item() == before

    in_a_step(config, check)


def test_weights_come_back_after_an_error():
    weight = torch.nn.Parameter(torch.tensor([0.1, 0.2]))
    weight.grad = torch.tensor([3.0, 4.0])
    own = weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), sam.ascended([weight], 10.0):
        torch.testing.assert_close(weight.detach(), own + torch.tensor([6.0, 8.0]))
        raise RuntimeError("inside")
    assert torch.equal(weight, own)


@pytest.mark.slow
def test_rivals_train_the_same_bits_each_time_and_leave_the_base_alone(config, base_path, monkeypatch):
    base = load_file(base_path / "unet" / "diffusion_pytorch_model.safetensors")
    checked = []

    class Check(Callback):
        def on_step_end(self, run):
            named = run.models["unet"].named_parameters()
            weights = {n.replace(".base_layer", ""): p for n, p in named if "lora_" not in n}
            assert_equal(weights, base)
            assert not any(p.requires_grad or p.grad is not None for p in weights.values())
            checked.append(run.step)

    check = Check()
    with_callbacks(monkeypatch, check)
    config = dataclasses.replace(config, lora_layers=("to_q", "to_out.0"))
    plain = run(config, callbacks=[check])
    state = global_rng_state()
    for rival in ("sam", "lora-sam", "bi-lora"):
        once = train_rival(config, f"{rival}-once", rival)
        if rival != "lora-sam":  # as SAM
            assert_equal(once, train_rival(config, f"{rival}-again", rival))
        assert once.keys() == plain.keys() and not any(torch.equal(once[n], plain[n]) for n in plain)
        assert_equal(plain, train_rival(config, f"{rival}-none", rival, rho=0.0))
    assert global_rng_state() == state
    assert checked == 9 * [1, 2]
    unet = UNet2DConditionModel.from_pretrained(base_path, subfolder="unet")
    StableDiffusionXLPipeline.load_lora_into_unet(
        *StableDiffusionXLPipeline.lora_state_dict(f"{config.output_dir}-bi-lora-once"), unet
    )
    loaded = layers({"unet": unet})
    assert len(loaded) == len(plain) / 2
    for layer in loaded.values():  # the trained adapter alone
        (name,) = layer.lora_A
        assert layer.lora_A[name].weight.shape[0] == config.rank


def with_callbacks(monkeypatch, *more) -> None:
    """Let the rivals' runs have more callbacks."""
    monkeypatch.setattr(arms, "train", lambda config, callbacks: train(config, [*callbacks, *more]))


def auxiliary_norm(models) -> float:
    """Of all updates of the second adapter, written out."""
    updates = [
        layer.scaling[rivals.AUXILIARY]
        * layer.lora_B[rivals.AUXILIARY].weight
        @ layer.lora_A[rivals.AUXILIARY].weight
        for layer in layers(models).values()
    ]
    return norm(updates)


@pytest.mark.slow
def test_the_second_adapter_stays_in_its_ball(config, monkeypatch):
    norms, models = [], []

    class Watch(Callback):
        def on_step_end(self, run):
            norms.append(auxiliary_norm(run.models))
            models.append(run.models["unet"])

    with_callbacks(monkeypatch, Watch())
    config = dataclasses.replace(config, max_train_steps=4)
    train_rival(config, "wide", "bi-lora", rho=1e6)
    assert norms == sorted(norms) and norms[0] > 0
    rho = norms[1]
    norms.clear()
    train_rival(config, "tight", "bi-lora", rho=rho)
    assert max(norms) == pytest.approx(rho, rel=1e-5), "it reaches the ball's edge and stays inside"
    assert norms[0] < rho
    assert all(model.peft_config.keys() == {"default"} for model in models), "it is gone afterwards"


@pytest.mark.slow
def test_the_second_adapter_follows_the_gradient_upwards(config, monkeypatch):
    """After the first step its B has moved by the learning rate along the sign of its gradient."""
    seen = {}

    class Watch(Callback):
        def backward(self, run, compute):
            own = layers(run.models)
            loss = compute()
            if run.step == 0:
                bs = {n: layer.lora_B[rivals.AUXILIARY].weight for n, layer in own.items()}
                seen["gradients"] = {n: b.grad.clone() for n, b in bs.items()}
                seen["a"] = {
                    n: layer.lora_A[rivals.AUXILIARY].weight.detach().clone() for n, layer in own.items()
                }
                assert not any(b.any() for b in bs.values()), "it starts with no update"
            else:
                for name, layer in own.items():
                    b = layer.lora_B[rivals.AUXILIARY].weight
                    gradient = seen["gradients"][name]
                    clear = gradient.abs() > 1e-5  # of AdamW's epsilon, 1e-8
                    expected = config.learning_rate * gradient.sign()
                    torch.testing.assert_close(b[clear], expected[clear], rtol=2e-3, atol=0)
                    assert torch.equal(layer.lora_A[rivals.AUXILIARY].weight, seen["a"][name])
                seen["checked"] = True
            return loss

    with_callbacks(monkeypatch, Watch())
    train_rival(config, "up", "bi-lora", rho=1e6, max_train_steps=2)
    assert seen["checked"]


def test_the_second_adapter_is_dropped_from_text_encoders_too():
    models = {"unet": build_unet(), "text_encoder": build_text_encoders()[0]}
    add_lora(models, rank=4, alpha=4, seed=0)
    for model in models.values():
        rivals.add_auxiliary(model, 7)
    rivals.BiLora(1.0).on_train_end(SimpleNamespace(models=models))
    for model in models.values():
        assert model.peft_config.keys() == {"default"}
        assert all(layer.lora_A.keys() == {"default"} for layer in layers({"model": model}).values())


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_keeping_in_the_ball_scales_the_update_to_its_radius(share):
    unet = build_unet()
    unet.requires_grad_(False)
    add_lora({"unet": unet}, rank=4, alpha=4, seed=0)
    state = global_rng_state()
    rivals.add_auxiliary(unet, 7)
    assert global_rng_state() == state
    generator = torch.Generator().manual_seed(0)
    own = list(layers({"unet": unet}).values())
    factors = [m[rivals.AUXILIARY].weight for layer in own for m in (layer.lora_A, layer.lora_B)]
    with torch.no_grad():
        for factor in factors:
            factor.copy_(torch.randn(factor.shape, generator=generator))
    before, was = [factor.detach().clone() for factor in factors], auxiliary_norm({"unet": unet})
    assert rivals.keep_in_ball(own, share * was) == pytest.approx(was, rel=1e-5)
    assert auxiliary_norm({"unet": unet}) == pytest.approx(min(1, share) * was, rel=1e-5)
    for factor, old in zip(factors, before, strict=True):  # A and B share the shrinking
        torch.testing.assert_close(factor.detach(), math.sqrt(min(1, share)) * old)


def test_the_noisier_the_fewer_ranks_are_active():
    timesteps = torch.tensor([0, 1, 250, 499, 500, 501, 999])
    assert active_ranks(timesteps, 4, 2).tolist() == [4, 3, 3, 3, 3, 2, 2]
    assert active_ranks(timesteps, 8, 8).tolist() == 7 * [8]


def test_t_lora_masks_the_ranks_of_each_sample_by_its_own_timestep():
    unet = build_unet()
    unet.requires_grad_(False)
    add_lora(
        {"unet": unet}, rank=4, alpha=8, seed=0, unet_targets=["to_q", "proj_in", "conv1", "time_emb_proj"]
    )
    own, seen = layers({"unet": unet}), {}
    with torch.no_grad():
        for layer in own.values():
            torch.nn.init.normal_(factors(layer)[1], std=0.1, generator=torch.Generator().manual_seed(0))
    inputs = unet_inputs() | {"timestep": torch.tensor([100, 900])}
    whole = unet(**inputs).sample
    for name, layer in own.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    active = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])  # floor(2 * 0.9) + 2, floor(2 * 0.1) + 2
    with timestep_ranks(unet, 0.5):
        masked = unet(**inputs).sample
        masked.square().sum().backward()
    assert {x.ndim for x, _ in seen.values()} == {2, 3, 4}
    for name, (x, y) in seen.items():
        a, b = factors(own[name])
        if x.ndim == 4:
            down = torch.nn.functional.conv2d(x, a, padding=own[name].lora_A["default"].padding)
            down = torch.einsum("nrhw,nr,mr->nmhw", down, active, b.flatten(1))
        else:
            down = torch.einsum("n...i,ri,nr,mr->n...m", x, a, active, b)
        torch.testing.assert_close(y, own[name].get_base_layer()(x) + 2 * down)
        assert not a.grad[3].any() and a.grad[2].any() and not b.grad[:, 3].any()
    seen.clear()
    assert not torch.equal(masked, whole) and torch.equal(unet(**inputs).sample, whole)


@pytest.mark.slow
def test_t_lora_with_all_ranks_is_plain_lora_and_with_half_of_them_another(config):
    plain = run(config)
    assert_equal(train_rival(config, "all", "t-lora", rho=1.0), plain)
    masked = train_rival(config, "half", "t-lora", rho=0.5, gradient_checkpointing=True)
    assert masked.keys() == plain.keys() and not all(torch.equal(masked[n], plain[n]) for n in plain)
