import copy
import functools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from flatlora_diffusion import FlatLoRA, FlatLoRAAttnProcessor
from tests.tiny import (
    TEXT_TARGETS,
    UNET_TARGETS,
    add_lora,
    build_text_encoders,
    build_unet,
    global_rng_state,
    unet_inputs,
)

EVERYWHERE = [
    *UNET_TARGETS,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv_shortcut",
    "conv_in",
]
SIGMA = 0.3


def tiny_unet(targets=UNET_TARGETS, slim=True, **config):
    unet = build_unet(slim=slim).train()
    unet.requires_grad_(False)
    add_lora(unet, targets, **config)
    return unet


def tiny_text_encoder(which):
    model = build_text_encoders()[which].train()
    model.requires_grad_(False)
    add_lora(model, TEXT_TARGETS)
    return model


def run_unet(unet, autocast=None):
    inputs = unet_inputs()
    if next(unet.parameters()).dtype == torch.float64:
        inputs = tree_map(lambda value: value.double() if torch.is_tensor(value) else value, inputs)
    sample = inputs["sample"].requires_grad_()
    # Autocast shares one cast of a leaf between its uses and so sums their gradients in half precision.
    inputs["sample"] = sample + 0
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        output = unet(**inputs, return_dict=False)[0]
    return output, sample


def run_text(model):
    ids = torch.randint(0, 590, (2, 9), generator=torch.Generator().manual_seed(0))
    output = model(ids, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(), output.last_hidden_state.flatten()]), None


def outcome(model, run):
    """Output, and gradients of the input and of every trained parameter."""
    model.zero_grad()
    output, x = run(model)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if x is not None:
        gradients["input"] = x.grad
    return output.detach(), gradients


def relative_errors(actual, expected):
    assert actual[1].keys() == expected[1].keys()
    pairs = {"output": (actual[0], expected[0])}
    pairs |= {name: (actual[1][name], gradient) for name, gradient in expected[1].items()}
    return {
        name: float((one.double() - other.double()).norm() / other.double().norm())
        for name, (one, other) in pairs.items()
    }


def assert_same_outcome(actual, expected, tolerance=1e-11):
    """That the algebra is the same: for outcomes in float64, whose rounding is far below the tolerance."""
    assert expected[0].dtype == torch.float64 or tolerance > 1e-11
    for name, error in relative_errors(actual, expected).items():
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_as_good_as(actual, twin, exact):
    """That rounding costs no more than it costs the twin, on the whole, measured from float64."""

    def distance(outcome):
        errors = relative_errors(outcome, exact).values()
        return (sum(error**2 for error in errors) / len(errors)) ** 0.5

    assert 0 < distance(actual) <= 1.25 * distance(twin)


def twin_of(model, flat, prefix=""):
    """The reference: a copy whose base weights really are `W + eps`."""
    with torch.no_grad():
        epsilons = {name.removeprefix(prefix): flat.epsilon(name).clone() for name in flat.layers}
    flat.remove()
    twin = copy.deepcopy(model)
    for name, eps in epsilons.items():
        weight = twin.get_submodule(name).get_base_layer().weight
        weight.data += eps.view_as(weight)
    return twin


def base_tensors(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def models():
    return [
        pytest.param(tiny_unet, run_unet, id="unet"),
        pytest.param(functools.partial(tiny_unet, EVERYWHERE), run_unet, id="unet, all layers"),
        pytest.param(functools.partial(tiny_text_encoder, 0), run_text, id="text encoder one"),
        pytest.param(functools.partial(tiny_text_encoder, 1), run_text, id="text encoder two"),
    ]


for_every_model = pytest.mark.parametrize(("build", "run"), models())
with_both_sources = pytest.mark.parametrize("noise", ["table", "gaussian"])


# Invariant 4: forward and gradients are those of a model whose weights are W + eps.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "run"),
    [
        *models(),
        pytest.param(
            functools.partial(tiny_unet, EVERYWHERE, slim=False),
            run_unet,
            id="unet, all layers of all blocks",
        ),
    ],
)
@with_both_sources
def test_equals_a_twin_with_materialised_noise(build, run, noise):
    model = build().double()
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant", noise=noise, seed=4)
    plain, actual = outcome(build().double(), run), outcome(model, run)
    assert_same_outcome(actual, outcome(twin_of(model, flat), run))
    assert (actual[0] - plain[0]).norm() / plain[0].norm() > 0.01, "the noise must show"


@pytest.mark.slow
@for_every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_noise(build, run, reentrant):
    model, reference = build().double(), build().double()
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    else:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # it needs an input that requires a gradient
            model.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_())
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant")
    actual = outcome(model, run)
    assert_same_outcome(actual, outcome(twin_of(reference, FlatLoRA(reference, **flat_settings(flat))), run))


def flat_settings(flat):
    return {key: value for key, value in flat.state_dict().items() if key != "global_step"}


@for_every_model
def test_float32_is_as_good_as_a_float32_twin(build, run):
    model = build()
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant")
    actual = outcome(model, run)
    twin = twin_of(model, flat)
    exact = outcome(copy.deepcopy(twin).double(), run)
    assert_as_good_as(actual, outcome(twin, run), exact)
    assert max(relative_errors(actual, exact).values()) < 1e-5


@pytest.mark.parametrize("targets", [UNET_TARGETS, EVERYWHERE], ids=["attention", "all layers"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32 base", "bfloat16 base"])
def test_bfloat16_autocast_is_as_good_as_a_twin_under_autocast(targets, base):
    unet = tiny_unet(targets)
    for name, parameter in unet.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    run = functools.partial(run_unet, autocast=torch.bfloat16)
    actual = outcome(unet, run)
    twin = twin_of(unet, flat)
    exact = outcome(copy.deepcopy(twin).double(), run_unet)
    assert_as_good_as(actual, outcome(twin, run), exact)


def test_an_optimizer_that_writes_past_the_version_counter_is_followed():
    unet = tiny_unet().double()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=4, schedule="constant")
    run_unet(unet)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(1.0)  # as Prodigy does; `parameter._version` stays what it was
    flat.step()
    output, _ = run_unet(unet)
    expected, _ = run_unet(twin_of(unet, flat))
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)


def test_accumulated_micro_batches_share_one_noise():
    def accumulate(model):
        for seed in (1, 2, 3):
            unet_output = model(**unet_inputs(seed), return_dict=False)[0]
            unet_output.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    unet = tiny_unet()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    actual = accumulate(unet)
    unet.zero_grad()
    for name, gradient in accumulate(twin_of(unet, flat)).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", [UNET_TARGETS, EVERYWHERE], ids=["attention", "all layers"])
def test_dora_equals_the_merged_model_plus_epsilon(targets, dropout):
    unet = tiny_unet(targets, use_dora=True, lora_dropout=dropout)
    for name, parameter in unet.named_parameters():
        if "lora_magnitude" in name:
            with torch.no_grad():
                parameter.mul_(1.5)
    if dropout:  # a mask that keeps everything unscaled: the path through dropout without its randomness
        for module in unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.forward = torch.clone
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    actual = run_unet(unet)[0]
    epsilons = {name: flat.epsilon(name) for name in flat.layers}
    stds = {name: flat.row_std(name) for name in flat.layers}
    flat.remove()
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    for name, eps in epsilons.items():
        weight = unet.get_submodule(name).get_base_layer().weight
        n = weight[0].numel()
        torch.testing.assert_close(
            stds[name], SIGMA / n**0.5 * weight.detach().flatten(1).norm(dim=1), rtol=1e-5, atol=0
        )
        weight.data += eps.view_as(weight)
    expected = run_unet(unet)[0]
    assert (actual - expected).norm() / expected.norm() < 2e-6


# Invariant 5: the row scales are those of the merged weight.


def merged_weight(layer):
    delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A)
    return (layer.get_base_layer().weight + delta).detach().flatten(1)


def assert_row_std_of_merged_weights(flat):
    for name, layer in flat.layers.items():
        weight = merged_weight(layer)
        expected = SIGMA * weight.norm(dim=1) / weight.shape[1] ** 0.5
        assert flat.row_std(name).dtype == torch.float32
        torch.testing.assert_close(flat.row_std(name), expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
    ],
    ids=["alpha 1", "alpha 32", "rslora", "pissa", "olora"],
)
def test_row_std_is_that_of_the_materialised_merged_weight(rank, config):
    rank = min(rank, 32) if "init_lora_weights" in config else rank  # an SVD of these layers has 32 values
    unet = tiny_unet(["to_q", "to_out.0"], r=rank, **config)
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert_row_std_of_merged_weights(flat)


@pytest.mark.slow
def test_row_std_of_several_active_adapters_and_convolutions():
    unet = tiny_unet(EVERYWHERE)
    add_lora(unet, ["to_q", "conv1"], seed=5, adapter_name="second", r=7, lora_alpha=3)
    unet.set_adapters(["default", "second"], [0.7, 1.3])
    unet.train().double()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert_row_std_of_merged_weights(flat)
    actual = outcome(unet, run_unet)
    assert_same_outcome(actual, outcome(twin_of(unet, flat), run_unet))


def test_adalora():
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=12, target_modules=UNET_TARGETS)
    unet = build_unet(slim=True).train()
    unet.requires_grad_(False)
    inject_adapter_in_model(config, unet)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_E" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    unet.double()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert_row_std_of_merged_weights(flat)
    actual = outcome(unet, run_unet)
    assert_same_outcome(actual, outcome(twin_of(unet, flat), run_unet))


def test_trained_biases_get_their_gradients():
    unet = tiny_unet(["to_out.0", "conv1"], bias="lora_only").double()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    actual = outcome(unet, run_unet)
    assert any(name.endswith("to_out.0.base_layer.bias") for name in actual[1])
    assert any(name.endswith("conv1.base_layer.bias") for name in actual[1])
    assert_same_outcome(actual, outcome(twin_of(unet, flat), run_unet))


def test_scales_follow_the_adapter_even_within_a_step():
    unet = tiny_unet().double()
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    run_unet(unet)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    actual = outcome(unet, run_unet)
    assert_same_outcome(actual, outcome(twin_of(unet, flat), run_unet))


# Invariants 1 to 3: nothing is left behind, and without noise nothing is changed.


@for_every_model
def test_base_weights_are_never_written_and_remove_restores_everything(build, run):
    model = build()
    run(model)  # transformers installs hooks of its own at the first call
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    before, modules = base_tensors(model), list(model.state_dict())
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        outcome(model, run)
        optimizer.step()
        flat.step()
    assert any(
        isinstance(m.processor, FlatLoRAAttnProcessor) for m in model.modules() if hasattr(m, "processor")
    ) == (len(processors) > 0)
    flat.remove()
    flat.remove()
    after = base_tensors(model)
    assert all(torch.equal(before[n], after[n]) for n in before if "lora_" not in n)
    assert any(not torch.equal(before[n], after[n]) for n in before if "lora_B" in n)
    assert list(model.state_dict()) == modules
    for name, module in model.named_modules():
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[name]
        assert "forward" not in module.__dict__
        if hasattr(module, "processor"):
            assert module.processor is processors[name]


@for_every_model
def test_an_exception_inside_forward_leaves_nothing_perturbed(build, run):
    model = build()
    before = base_tensors(model)
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant")
    layer = list(flat.layers.values())[1]

    def forwards():
        return {
            name: m.__dict__.get("forward") for name, m in model.named_modules() if "forward" in m.__dict__
        }

    attached = forwards()  # of layers outside of attention blocks

    def fail(module, args):
        raise RuntimeError("broken on purpose")

    handle = layer.lora_B["default"].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(model)
    handle.remove()
    assert forwards() == attached
    noisy = outcome(model, run)
    flat.remove()
    assert not forwards()
    assert all(torch.equal(before[n], tensor) for n, tensor in base_tensors(model).items())
    assert not torch.equal(noisy[0], outcome(model, run)[0])


@for_every_model
@with_both_sources
def test_the_global_rng_is_untouched(build, run, noise):
    model = build()
    state = global_rng_state()
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, noise=noise)
    for _ in range(3):
        outcome(model, run)
        flat.step()
    flat.epsilon(next(iter(flat.layers)))
    flat.remove()
    assert global_rng_state() == state


@pytest.mark.slow
@for_every_model
def test_without_noise_the_bits_are_those_of_plain_lora(build, run):
    plain_train, plain_eval = outcome(build(), run), outcome(build().eval(), run)

    def assert_bits(actual, expected):
        assert torch.equal(actual[0], expected[0])
        assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])

    model = build()
    flat = FlatLoRA(model, sigma=0.0, total_steps=10, schedule="constant")
    assert_bits(outcome(model, run), plain_train)
    flat.remove()
    flat = FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant")
    with flat.paused():
        with flat.paused():
            pass
        assert_bits(outcome(model, run), plain_train)
    assert not torch.equal(outcome(model, run)[0], plain_train[0])
    model.eval()
    assert_bits(outcome(model, run), plain_eval)


def test_disabled_adapters_are_not_perturbed():
    unet = tiny_unet()
    unet.disable_adapters()
    plain = run_unet(unet)[0]
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert torch.equal(run_unet(unet)[0], plain)
    unet.enable_adapters()
    assert not torch.equal(run_unet(unet)[0], plain)
    flat.remove()


def test_adapter_name_limits_the_noise_to_that_adapter():
    unet = tiny_unet(["to_q"])
    add_lora(unet, ["to_v"], seed=3, adapter_name="other")
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant", adapter_name="other")
    assert flat.layers and all(name.endswith("to_v") for name in flat.layers)
    unet.set_adapter("default")
    noisy = run_unet(unet)[0]
    flat.remove()
    assert torch.equal(run_unet(unet)[0], noisy)


# The clock, and what a resume needs.


def test_noise_is_a_function_of_seed_step_and_name_alone():
    unet = tiny_unet()
    flat = FlatLoRA([unet], sigma=SIGMA, total_steps=10, seed=3)
    name, other = list(flat.layers)[:2]
    assert flat.sigma_t == 0 and not flat.epsilon(name).any()
    for _ in range(4):
        flat.step()
    eps = flat.epsilon(name)
    assert flat.global_step == 4 and flat.sigma_t == pytest.approx(SIGMA * 0.3454915)
    assert not torch.equal(eps, flat.epsilon(other))
    state = flat.state_dict()
    flat.step()
    assert not torch.equal(eps, flat.epsilon(name))
    flat.remove()
    fresh = FlatLoRA([unet], sigma=0.01, total_steps=99, schedule="linear", seed=8, noise="gaussian")
    fresh.load_state_dict(state)
    assert torch.equal(eps, fresh.epsilon(name))
    fresh.global_step = 0
    assert fresh.sigma_t == 0
    fresh.load_state_dict({**state, "seed": 5})
    assert not torch.equal(eps, fresh.epsilon(name))


def test_models_in_one_object_have_names_and_noise_of_their_own():
    one, two = build_text_encoders()
    unet = tiny_unet()
    for encoder in (one, two):
        add_lora(encoder, TEXT_TARGETS)
    flat = FlatLoRA([unet, one, two], sigma=SIGMA, total_steps=10, schedule="constant")
    assert len(flat.layers) == len(set(map(id, flat.layers.values())))
    assert {name[:2] for name in flat.layers} == {"0.", "1.", "2."}
    first, second = (
        next(
            flat.epsilon(name)
            for name in flat.layers
            if name.startswith(index) and name.endswith("0.self_attn.q_proj")
        )
        for index in ("1.", "2.")
    )
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.15


# The processor is a good citizen of diffusers.


def test_the_processor_passes_on_what_the_wrapped_one_accepts():
    seen = {}

    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, style=None):
            seen["style"] = style
            return attn.to_out[0](attn.to_q(hidden_states))

    unet = tiny_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.set_processor(Processor())
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert isinstance(attention.processor, FlatLoRAAttnProcessor)
    assert attention.processor.processor.__class__ is Processor
    attention(torch.zeros(1, 3, 64), style="flat")
    assert seen == {"style": "flat"}
    flat.remove()


def test_a_processor_with_weights_keeps_them_where_optimizers_look():
    class Processor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return self.gain * attn.to_out[0](attn.to_q(hidden_states))

    unet = tiny_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    processor = Processor()
    attention.set_processor(processor)
    keys = list(unet.state_dict())
    flat = FlatLoRA(unet, sigma=SIGMA, total_steps=10, schedule="constant")
    assert any(parameter is processor.gain for parameter in unet.parameters())
    assert torch.isfinite(attention(torch.ones(1, 3, 64))).all()
    flat.remove()
    assert attention.processor is processor and list(unet.state_dict()) == keys


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, r"sigma=-0\.1 must be finite and >= 0"),
        ({"sigma": float("nan")}, "sigma=nan must be finite"),
        ({"sigma": float("inf")}, "sigma=inf must be finite"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"schedule": "cosin"}, "schedule='cosin' is unknown; choose one of cosine, linear, constant"),
        ({"noise": "pink"}, "noise='pink' is unknown; choose one of table, gaussian"),
        ({"adapter_name": "nobody"}, "no LoRA layer with adapter 'nobody'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FlatLoRA(tiny_unet(), **{"sigma": 0.1, "total_steps": 10, **settings})


def test_a_model_without_adapters_is_named_and_nothing_stays_attached():
    unet, bare = tiny_unet(), build_unet()
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no LoRA layer; call model.add_adapter"):
        FlatLoRA([unet, bare], sigma=0.1, total_steps=10)
    with pytest.raises(ValueError, match="models is empty"):
        FlatLoRA([], sigma=0.1, total_steps=10)
    assert not any(isinstance(getattr(m, "processor", None), FlatLoRAAttnProcessor) for m in unet.modules())


def test_a_base_weight_that_is_trained_too_is_refused():
    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"attn1\.to_q: .* trained too \(requires_grad=True\)"):
        FlatLoRA(unet, sigma=0.1, total_steps=10)


@pytest.mark.parametrize("build", [tiny_unet, functools.partial(tiny_text_encoder, 0)], ids=["unet", "text"])
def test_attaching_twice_is_refused_and_the_first_survives(build):
    model = build()
    flat = FlatLoRA(model, sigma=0.1, total_steps=10, schedule="constant")
    with pytest.raises(ValueError, match=r"already has Flat-LoRA attached; call \.remove\(\)"):
        FlatLoRA(model, sigma=0.1, total_steps=10)
    flat.remove()
    FlatLoRA(model, sigma=0.1, total_steps=10).remove()


class Unsupported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=2)
        self.reflecting = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = torch.nn.Conv2d(8, 8, 3, padding="same")


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("embedding", {}, "embedding: Flat-LoRA cannot perturb a peft.*Embedding adapter"),
        ("grouped", {}, "grouped: Flat-LoRA cannot perturb a convolution with groups=2"),
        ("reflecting", {}, "reflecting: .* padding_mode='reflect'"),
        ("same", {}, "same: .* padding='same'"),
        ("linear", {"init_lora_weights": "mica"}, "linear: .* variant MiCALinearVariant"),
    ],
)
def test_unsupported_layers_are_named(target, config, message):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=[target], **config), Unsupported())
    with pytest.raises(ValueError, match=message + ".*remove this layer from the adapter's target_modules"):
        FlatLoRA(model, sigma=0.1, total_steps=10)


def test_a_list_of_active_adapters_that_is_changed_in_place_is_noticed():
    unet = build_unet()
    unet.requires_grad_(False)
    add_lora(unet)
    add_lora(unet, adapter_name="second", seed=2)
    flat = FlatLoRA(unet.train(), sigma=0.1, total_steps=1, schedule="constant")
    name = next(iter(flat.layers))
    names = ["default"]
    for layer in flat.layers.values():
        layer.set_adapter(names)
    alone = flat.row_std(name)
    names.append("second")
    both = flat.row_std(name)
    assert not torch.equal(alone, both)
