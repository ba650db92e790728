"""A base in 4 or 8 bits: made as diffusers makes it, perturbed as its dequantised weights would be.

All of it runs on the CPU with the kernels that bitsandbytes has for it.
"""

import builtins
import copy
import dataclasses
import functools
import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import BitsAndBytesConfig, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import LlamaForCausalLM

from flatlora_diffusion import FlatLoRA
from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.flat.noise import TableDraw
from flatlora_diffusion.flat.noisy_base import compute_dequantized
from flatlora_diffusion.flat.quantized import QuantizedWeight
from flatlora_diffusion.sdxl import lora
from flatlora_diffusion.sdxl.quantize import quantize
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from tests.flat.test_flat_lora import (
    EVERYWHERE,
    SIGMA,
    assert_as_good_as,
    outcome,
    relative_errors,
    run_unet,
    tiny_unet,
)
from tests.flat.test_other_models import llama, run_llama
from tests.tiny import (
    UNET_TARGETS,
    add_lora,
    assert_equal,
    build_unet,
    global_rng_state,
    run,
    unet_inputs,
)

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CPU = torch.device("cpu")
KINDS = ("4bit", "8bit")
for_both_kinds = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = 3e-5  # bitsandbytes multiplies the 8-bit codes and their scale in another order


def assert_equals(kind, actual, twin, run):
    """The twin's outcome: as exact as it in 4 bits, where the multiply-add rounds once instead of twice."""
    expected = outcome(twin, run)
    if kind == "8bit":
        assert max(relative_errors(actual, expected).values()) <= TOLERANCE
    else:
        exact = outcome(copy.deepcopy(twin).double(), run)
        assert_as_good_as(actual, expected, exact)
        assert max(relative_errors(actual, exact).values()) < 1e-5


def is_quantized(module):
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def quantized_unet(kind, targets=UNET_TARGETS, dtype=torch.float32, **config):
    unet = build_unet(slim=True).to(dtype).requires_grad_(False)
    quantize(unet, kind, CPU)
    add_lora(unet, targets, **config)
    return unet.train()


def inputs_in(dtype):
    inputs = unet_inputs()
    for name in ("sample", "encoder_hidden_states"):
        inputs[name] = inputs[name].to(dtype)
    return inputs


def stored(model):
    """Everything that a quantised base consists of, by name."""
    tensors = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state.as_dict(packed=True)
            tensors |= {f"{name}.weight.{key}": value for key, value in state.items()}
        elif is_quantized(module):
            tensors[f"{name}.SCB"] = scale(module)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def scale(layer):
    return layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB


def dequantized(layer):
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data.float() * scale(layer)[:, None] / 127


def twin_of(model, twin, flat=None):
    """The reference: real linear layers that hold the dequantised weights, and the noise if there is any."""
    with torch.no_grad():
        trained = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                parameter.copy_(trained[name])
        for name, module in model.named_modules():
            if is_quantized(module):
                twin.get_submodule(name).weight.data = dequantized(module).to(next(twin.parameters()).dtype)
        for name in flat.layers if flat else ():
            weight = twin.get_submodule(name).get_base_layer().weight
            weight += flat.epsilon(name).view_as(weight)
    return twin


def attach(model, **settings):
    return FlatLoRA(
        model, **{"sigma": SIGMA, "total_steps": 10, "schedule": "constant", "seed": 2, **settings}
    )


# Making a quantised base.


@for_both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_has_the_bits_that_diffusers_gives_it(kind, dtype, tmp_path, monkeypatch):
    # Its check of the machine is all that keeps the loader of diffusers from working here.
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, **settings: None)
    settings = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "8bit": {"load_in_8bit": True},
    }
    build_unet().save_pretrained(tmp_path)
    expected = UNet2DConditionModel.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**settings[kind]),
        dtype=dtype,
        device_map={"": "cpu"},
    )
    actual = build_unet().to(dtype)
    quantize(actual, kind, CPU)
    assert_equal(stored(actual), stored(expected))
    assert sum(map(is_quantized, actual.modules())) == 60
    for name, module in expected.named_modules():
        if kind == "4bit" and is_quantized(module):
            assert actual.get_submodule(name).compute_dtype == module.compute_dtype
        elif is_quantized(module):
            assert actual.get_submodule(name).state.threshold == module.state.threshold
    inputs = inputs_in(dtype)
    for mode in (True, False):
        with torch.no_grad():
            outputs = [model.train(mode)(**inputs, return_dict=False)[0] for model in (actual, expected)]
        assert torch.equal(*outputs)


@for_both_kinds
def test_adapters_start_as_those_of_the_plain_base(kind):
    models = [build_unet().requires_grad_(False) for _ in range(2)]
    quantize(models[0], kind, CPU)
    for model in models:
        lora.add_lora({"unet": model}, rank=4, alpha=4, seed=1)
    actual, expected = (
        {name: p for name, p in model.named_parameters() if p.requires_grad} for model in models
    )
    assert_equal(actual, expected)
    assert all(p.dtype == torch.float32 for p in actual.values())


# The noise: forward, gradients and scales are those of the dequantised weights.


@pytest.mark.slow
@for_both_kinds
@pytest.mark.parametrize(
    ("targets", "noise"), [(UNET_TARGETS, "gaussian"), (EVERYWHERE, "table")], ids=["attention", "all layers"]
)
def test_equals_a_twin_with_dequantized_weights_and_materialised_noise(kind, noise, targets):
    unet = quantized_unet(kind, targets)
    plain = outcome(unet, run_unet)
    flat = attach(unet, noise=noise)
    actual = outcome(unet, run_unet)
    assert_equals(kind, actual, twin_of(unet, tiny_unet(targets), flat), run_unet)
    assert (actual[0] - plain[0]).norm() / plain[0].norm() > 0.1, "the noise must show"


@for_both_kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_noise(kind, reentrant):
    unet = quantized_unet(kind)
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    flat = attach(unet)
    actual = outcome(unet, run_unet)
    assert_equals(kind, actual, twin_of(unet, tiny_unet(), flat), run_unet)


@for_both_kinds
def test_half_precision_under_autocast(kind):
    unet = quantized_unet(kind, dtype=torch.bfloat16)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    flat = attach(unet)

    def gradients(model, dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(**inputs_in(dtype), return_dict=False)[0]
        output.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    actual = gradients(unet, torch.bfloat16)
    twin = twin_of(unet, tiny_unet(), flat)
    expected = gradients(twin, torch.float32)
    twin.zero_grad()
    for name, parameter in twin.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    rounding = (gradients(twin, torch.bfloat16) - expected).norm()
    assert (actual - expected).norm() < 1.5 * rounding, "more than the precision of bfloat16 is lost"


@pytest.mark.parametrize(
    ("kind", "base_dtype", "input_dtype"),
    [
        ("4bit", torch.bfloat16, torch.bfloat16),
        ("4bit", torch.bfloat16, torch.float32),
        ("4bit", torch.float16, torch.float32),
        ("8bit", torch.bfloat16, torch.bfloat16),
        ("8bit", torch.float32, torch.float32),
    ],
)
def test_a_layer_computes_in_the_precision_of_bitsandbytes_and_keeps_no_weight(
    kind, base_dtype, input_dtype, monkeypatch
):
    m, n = 96, 80
    model = torch.nn.Sequential(torch.nn.Linear(n, m)).to(base_dtype).requires_grad_(False)
    quantize(model, kind, CPU)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)  # B is zero
    flat = attach(model)
    base = model[0].base_layer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, n, generator=generator).to(input_dtype).requires_grad_()
    saved, transient = [], []

    def save(tensor):
        saved.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments):
            result = original(*arguments)
            transient.append(weakref.ref(result))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(QuantizedWeight, "dequantized")
    watch(TableDraw, "added_to")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model(x)
    assert m * n not in saved and saved
    assert len(transient) > 1 and not any(reference() is not None for reference in transient)
    monkeypatch.undo()
    sums, add = [], TableDraw.added_to

    def keep(draw, weight):
        sums.append(add(draw, weight))
        return sums[-1]

    monkeypatch.setattr(TableDraw, "added_to", keep)
    upstream = torch.randn(output.shape, generator=generator).to(output.dtype)
    output.backward(upstream)

    (noisy,), eps = sums, flat.epsilon("0").double()
    assert noisy.dtype == (base_dtype if kind == "4bit" else torch.float32)
    # Rounded once, where `eps` by itself has been rounded too, and so has what was multiplied out of 8 bits.
    weight, unit = dequantized(base).double(), torch.finfo(noisy.dtype).eps / 2
    roundings = (weight + eps).abs() + eps.abs() + (0 if kind == "4bit" else 4 * weight.abs())
    assert ((noisy.double() - weight - eps).abs() <= (1 + 4 * unit) * unit * roundings).all()
    compute = base_dtype if kind == "4bit" else input_dtype
    noisy = noisy.to(compute)
    expected = torch.nn.functional.linear(x.to(compute), noisy, base.bias.to(compute)).to(input_dtype)
    gradient = (upstream.to(compute) @ noisy).to(input_dtype)
    assert (output - expected).float().norm() <= 1e-6 * expected.float().norm()
    assert (x.grad - gradient).float().norm() <= 1e-6 * gradient.float().norm()


@for_both_kinds
@pytest.mark.parametrize("rank", [1, 16])
def test_row_std_is_that_of_the_dequantized_merged_weight(kind, rank):
    unet = quantized_unet(kind, r=rank, lora_alpha=3)
    add_lora(unet, ["to_q"], seed=5, adapter_name="second", r=7, lora_alpha=3)
    unet.set_adapters(["default", "second"], [0.7, 1.3])
    flat = attach(unet.train())
    for name, layer in flat.layers.items():
        active = [a for a in layer.active_adapters if a in layer.lora_A]
        weight = dequantized(layer.get_base_layer()) + sum(layer.get_delta_weight(a) for a in active)
        expected = SIGMA * weight.norm(dim=1) / weight.shape[1] ** 0.5
        assert flat.row_std(name).dtype == torch.float32
        torch.testing.assert_close(flat.row_std(name), expected.detach(), rtol=1e-5, atol=0)
        assert flat.epsilon(name).shape == weight.shape


@for_both_kinds
def test_dora_equals_the_merged_dequantized_model_plus_epsilon(kind):
    unet = quantized_unet(kind, use_dora=True)
    for name, parameter in unet.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1.5
    flat = attach(unet)
    actual = run_unet(unet)[0]
    epsilons = {name: flat.epsilon(name) for name in flat.layers}
    stds = {name: flat.row_std(name) for name in flat.layers}
    twin = twin_of(unet, tiny_unet(use_dora=True))
    for name, eps in epsilons.items():
        twin.get_submodule(name).merge()
        weight = twin.get_submodule(name).get_base_layer().weight
        expected_std = SIGMA * weight.detach().norm(dim=1) / weight.shape[1] ** 0.5
        torch.testing.assert_close(stds[name], expected_std, rtol=1e-5, atol=0)
        weight.data += eps
    expected = run_unet(twin)[0]
    assert (actual - expected).norm() / expected.norm() < 3e-6


def test_transformers_bases_that_are_loaded_in_4_bits(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    quantization = TransformersBitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )
    model, plain = (get_peft_model(m.requires_grad_(False), config).train() for m in (model, plain))
    flat = attach(model)
    actual = outcome(model, run_llama)
    assert_equals("4bit", actual, twin_of(model, plain, flat), run_llama)


# Nothing is left behind, and without noise nothing is changed.


@pytest.mark.parametrize("training", [True, False])
def test_in_the_trainer_8_bits_are_dequantised_with_noise_and_without(training):
    unet = quantized_unet("8bit").train(training)
    own = outcome(unet, run_unet)
    compute_dequantized(unet)
    plain = outcome(unet, run_unet)
    assert_equals("8bit", plain, twin_of(unet, tiny_unet().train(training)), run_unet)
    assert training or not torch.equal(plain[0], own[0]), "by itself it rounds its input in eval() mode"
    flat = attach(unet)
    with flat.paused():
        assert torch.equal(outcome(unet, run_unet)[0], plain[0])
    assert torch.equal(outcome(unet, run_unet)[0], plain[0]) is not training
    flat.remove()
    assert torch.equal(outcome(unet, run_unet)[0], plain[0])


@pytest.mark.slow
@for_both_kinds
def test_without_noise_the_bits_are_those_of_plain_lora(kind):
    plain_train = outcome(quantized_unet(kind), run_unet)
    plain_eval = outcome(quantized_unet(kind).eval(), run_unet)

    def assert_bits(actual, expected):
        assert torch.equal(actual[0], expected[0])
        assert_equal(actual[1], expected[1])

    unet = quantized_unet(kind)
    flat = attach(unet, sigma=0.0)
    assert_bits(outcome(unet, run_unet), plain_train)
    flat.remove()
    flat = attach(unet)
    with flat.paused():
        assert_bits(outcome(unet, run_unet), plain_train)
    assert not torch.equal(outcome(unet, run_unet)[0], plain_train[0])
    assert_bits(outcome(unet.eval(), run_unet), plain_eval)
    flat.remove()
    assert_bits(outcome(unet.train(), run_unet), plain_train)


@pytest.mark.slow
@for_both_kinds
def test_the_quantized_base_and_the_global_rng_are_untouched(kind):
    unet = quantized_unet(kind, EVERYWHERE)
    before, state = stored(unet), global_rng_state()
    flat = attach(unet)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        outcome(unet, run_unet)
        optimizer.step()
        flat.step()
    flat.remove()
    assert_equal(stored(unet), before)
    assert global_rng_state() == state
    assert not any("forward" in module.__dict__ for module in unet.modules())


# What cannot be perturbed is named.


def unquantized_4bit():
    return bnb.nn.Linear4bit(8, 8)


def unquantized_8bit():
    return bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True).requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (unquantized_4bit, LoraConfig, "a Linear4bit whose weight isn't quantised"),
        (unquantized_8bit, LoraConfig, "a Linear8bitLt whose weight isn't quantised"),
        (
            lambda: bnb.nn.Linear4bit(8, 8).to("cpu"),
            functools.partial(AdaLoraConfig, total_step=10),
            "a peft.*SVDLinear4bit adapter",
        ),
    ],
)
def test_layers_that_cannot_be_perturbed_are_named(build, config, message):
    model = torch.nn.ModuleDict({"linear": build()})
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    model = inject_adapter_in_model(config(target_modules=["linear"]), model)
    with pytest.raises(ValueError, match=f"linear: Flat-LoRA cannot perturb {message}"):
        attach(model)


def test_weights_that_bitsandbytes_repacked_for_inference_are_named(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    unet = quantized_unet("4bit")
    flat = attach(unet)
    layer = next(iter(flat.layers.values())).get_base_layer()
    # What a pass in eval mode does on a processor with AVX512-BF16.
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(ValueError, match="repacked the 4-bit weights for inference in eval"):
        run_unet(unet)
    # `quantize` has seen to it that they never are.
    assert bnb.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu
    assert not any(layer.support_avx512bf16_for_cpu for layer in unet.modules() if is_quantized(layer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize_base": "2bit"}, "--quantize_base 2bit: not one of 4bit, 8bit"),
        ({"quantize_base": "8bit", "use_dora": True}, "--use_dora: PEFT has no DoRA on 8 bits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_a_missing_package_is_named_before_anything_is_written(config, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **settings):
        if name == "bitsandbytes":
            raise ImportError(name)
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="--quantize_base 4bit needs the package bitsandbytes: pip install"):
        train(
            dataclasses.replace(
                config,
                quantize_base="4bit",
                with_prior_preservation=True,
                class_data_dir=str(tmp_path / "class"),
                class_prompt="a icon",
                num_class_images=1,
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]


@pytest.mark.slow
def test_without_bitsandbytes_everything_else_works(launcher, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import sys
for name in list(sys.modules):  # to be imported anew
    if name.partition(".")[0] in ("bitsandbytes", "peft", "flatlora_diffusion"):
        del sys.modules[name]
sys.modules["bitsandbytes"] = None
import torch
from peft import LoraConfig, inject_adapter_in_model
from flatlora_diffusion import FlatLoRA
model = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 8).requires_grad_(False)})
model = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), model)
flat = FlatLoRA(model, sigma=0.1, total_steps=1, schedule="constant")
model["linear"](torch.ones(1, 8)).sum().backward()
assert flat.epsilon("linear").any()
""")
    done = launcher.run(program)
    assert done.code == 0, done.stderr


# Whole runs.


@pytest.mark.slow
@for_both_kinds
def test_a_run_trains_on_a_quantized_base_and_goes_on_with_the_same_bits(config, icons, kind, tmp_path):
    bases = []

    class Watch(Callback):
        def on_train_begin(self, run):
            bases.append(stored(run.models["unet"]))

        on_train_end = on_train_begin

    watch = Watch()
    config = dataclasses.replace(
        config,
        quantize_base=kind,
        flat_sigma=0.3,
        flat_schedule="constant",
        max_train_steps=3,
        checkpointing_steps=1,
    )
    state = global_rng_state()
    whole = run(config, callbacks=[watch])
    assert global_rng_state() == state
    assert_equal(*bases)
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in bases[0].values())
    output = Path(config.output_dir)
    facts = read_facts(output / WEIGHTS_NAME)
    assert facts["quantize_base"] == kind and "bitsandbytes" in facts["versions"]

    with pytest.raises(UserError, match=r"belongs to other settings \(quantize_base"):
        run(config, resume_from_checkpoint="checkpoint-1", quantize_base=None)
    (output / WEIGHTS_NAME).unlink()
    resumed = run(
        config,
        callbacks=[watch],
        resume_from_checkpoint="checkpoint-1",
        # All that does not decide the adapter works too.
        gradient_checkpointing=True,
        heldout_data_dir=str(icons),
        heldout_steps=3,
        validation_prompt=("a icon",),
        num_validation_images=1,
        validation_inference_steps=1,
    )
    assert_equal(resumed, whole)
    assert_equal(bases[-1], bases[0])
    assert json.loads((output / "summary.json").read_text())["heldout_losses"].keys() == {"3"}
    assert (output / "validation" / "step-000002.png").is_file()
    assert (output / "comparison.png").is_file(), "drawn with the adapter on the base as it is on disk"

    if kind == "4bit":
        without_noise = run(config, flat_sigma=0.0, output_dir=str(tmp_path / "plain"))
        assert max((whole[name] - without_noise[name]).abs().max() for name in whole) > 1e-4


@pytest.mark.slow
def test_4_bit_dora_text_encoders_and_mixed_precision_train(config):
    trained = run(
        config,
        quantize_base="4bit",
        use_dora=True,
        train_text_encoder=True,
        mixed_precision="bf16",
        lora_layers=("to_q", "conv1"),
        max_train_steps=2,
    )
    assert all(tensor.isfinite().all() for tensor in trained.values())
    b = {name: tensor for name, tensor in trained.items() if ".lora_B." in name or ".up." in name}
    moved = {name.split(".")[0] for name, tensor in b.items() if tensor.any()}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
