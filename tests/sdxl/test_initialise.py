"""How a LoRA starts: PEFT's initialisations on a base that keeps its bits."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from torch import nn

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes, adapter_tensors, load_adapter_tensors
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.output import record
from flatlora_diffusion.output.checkpoint import find_checkpoint
from flatlora_diffusion.sdxl import initialise as initialising
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import encode_prompts
from flatlora_diffusion.sdxl.initialise import LORA_GA_SAMPLES, check, initialise, subtract_initial_update
from flatlora_diffusion.sdxl.lora import ADAPTER, FROZEN_ADAPTER, TEXT_ENCODERS, add_lora
from flatlora_diffusion.train import learner as learners
from flatlora_diffusion.train.learner import Learner
from tests.tiny import (
    UNET_TARGETS,
    assert_equal,
    build_text_encoders,
    build_unet,
    global_rng_state,
    run,
    stop_after,
    unet_inputs,
)

SUBTRACTED = ["pissa", "pissa_niter_4", "olora", "lora_ga"]
KINDS = ["gaussian", "default", "eva", *SUBTRACTED]
RANK, ALPHA, BATCH = 4, 10.0, 2


def build_models() -> dict[str, nn.Module]:
    models = dict(zip(TEXT_ENCODERS, build_text_encoders(), strict=True)) | {"unet": build_unet()}
    for model in models.values():
        model.requires_grad_(False).train()
    return models


def loss_of(models: dict[str, nn.Module], number: int) -> torch.Tensor:
    """A loss through all the models, of data that the number decides."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 590, (BATCH, 77), generator=generator)
    one, two = (models[part](ids, output_hidden_states=True) for part in TEXT_ENCODERS)
    inputs = unet_inputs(seed=number, batch=BATCH)
    inputs["encoder_hidden_states"] = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    inputs["added_cond_kwargs"]["text_embeds"] = two.text_embeds
    predicted = models["unet"](**inputs).sample
    return (predicted - torch.randn(predicted.shape, generator=generator)).square().mean()


def start(kind: str, models: dict[str, nn.Module] | None = None, *, seed: int = 0, **settings):
    """Models with adapters that start as a run's do."""
    models = models or build_models()
    drawn = "gaussian" if kind == "gaussian" else True
    settings = {"rank": RANK, "alpha": ALPHA, **settings}
    add_lora(models, seed=seed, init_lora_weights=drawn, **settings)
    check(models, kind)
    initialise(models, kind, seed=seed, batch_size=BATCH, loss=lambda number: loss_of(models, number))
    if kind in SUBTRACTED:
        subtract_initial_update(models)
    return models


@functools.cache
def started(kind: str) -> dict[str, nn.Module]:
    """The same as `start`, to be looked at but not changed."""
    return start(kind)


def lora_layers(models: dict[str, nn.Module]) -> dict[str, LoraLayer]:
    return {
        f"{part}.{name}": module
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def factors(layer: LoraLayer, adapter: str = ADAPTER) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()


def move(models: dict[str, nn.Module]) -> None:
    """Change what is trained, as training would."""
    generator = torch.Generator().manual_seed(5)
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def without_adapters(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}".replace(".base_layer", ""): tensor
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


# The start.


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_base_does_and_leaves_every_bit_of_it(kind):
    base = build_models()
    expected = loss_of(base, 7).item()
    rng = global_rng_state()
    models = started(kind)
    assert global_rng_state() == rng
    assert loss_of(models, 7).item() == pytest.approx(expected, rel=1e-6)
    assert_equal(without_adapters(models), without_adapters(base))
    for name, layer in lora_layers(models).items():
        a, b = factors(layer)
        assert a.dtype == b.dtype == torch.float32 and a.abs().max() > 0, name
        assert layer.training and not hasattr(layer.get_base_layer(), "_peft_loraga_grad")
        assert layer.scaling[ADAPTER] == ALPHA / RANK
        if kind in SUBTRACTED:
            frozen_a, frozen_b = factors(layer, FROZEN_ADAPTER)
            assert torch.equal(frozen_a, a) and torch.equal(frozen_b, -b)
            assert layer.scaling[FROZEN_ADAPTER] == ALPHA / RANK
        else:
            assert not b.any() and FROZEN_ADAPTER not in layer.lora_A
    trainable = {n for m in models.values() for n, p in m.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith(f".{ADAPTER}.weight") for name in trainable)
    assert not any(p.grad is not None for m in models.values() for p in m.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "default", "pissa_niter_4"])
def test_it_is_a_function_of_the_seed(kind):
    adapters = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(len(adapters))
            adapters.append(adapter_tensors(start(kind, seed=seed)))
    assert_equal(*adapters[:2])
    assert not all(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_takes_the_principal_components(use_rslora):
    models = start("pissa", use_rslora=use_rslora)
    for layer in lora_layers(models).values():
        (a, b), scaling = factors(layer), layer.scaling[ADAPTER]
        assert scaling == (ALPHA / RANK**0.5 if use_rslora else ALPHA / RANK)
        u, s, vh = torch.linalg.svd(layer.get_base_layer().weight)
        torch.testing.assert_close(scaling * b @ a, u[:, :RANK] * s[:RANK] @ vh[:RANK], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-4)  # singular values on both sides


def test_an_approximate_pissa_comes_near_the_exact_one():
    exact, near = lora_layers(started("pissa")), lora_layers(start("pissa_niter_16"))
    for name, layer in exact.items():
        kept = [(b @ a).norm().item() for a, b in (factors(layer), factors(near[name]))]
        assert kept[1] == pytest.approx(kept[0], rel=0.05)


def test_olora_takes_the_qr_decomposition():
    for layer in lora_layers(started("olora")).values():
        a, b = factors(layer)
        q, r = torch.linalg.qr(layer.get_base_layer().weight)
        torch.testing.assert_close(b, q[:, :RANK])
        torch.testing.assert_close(a, r[:RANK])


def test_eva_takes_the_principal_directions_of_the_inputs():
    models = started("eva")
    shown: dict[str, list[torch.Tensor]] = {}
    twin = build_models()
    for part, model in twin.items():
        for name, module in model.named_modules(prefix=part):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: shown.setdefault(name, []).extend(inputs[:1])
            )
    with torch.no_grad():
        for number in range(8):
            loss_of(twin, number)
    shares = []
    for name, layer in lora_layers(models).items():
        a, _ = factors(layer)
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-4)
        covariance = torch.cov(torch.cat(shown[name]).flatten(0, -2).T)
        best = torch.linalg.eigvalsh(covariance)[-RANK:].sum()
        shares.append(((a @ covariance @ a.T).trace() / best).item())
    # PEFT stops where a direction moves by less than 0.01 from batch to batch; random ones have 0.1 to 0.6.
    assert min(shares) > 0.8 and sum(shares) / len(shares) > 0.95
    # Layers that are shown the same start the same.
    self_attention = models["unet"].mid_block.attentions[0].transformer_blocks[0].attn1
    assert torch.equal(factors(self_attention.to_q)[0], factors(self_attention.to_v)[0])


@pytest.mark.slow
def test_lora_ga_takes_directions_of_the_gradient():
    models = started("lora_ga")
    twin = build_models()
    layers = lora_layers(models)
    weights = {name: twin[name.split(".")[0]].get_submodule(name.split(".", 1)[1]).weight for name in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    batches = LORA_GA_SAMPLES // BATCH
    for number in range(batches):
        loss_of(twin, number).backward()
    idle = [name for name, weight in weights.items() if weight.grad is None]
    assert idle == [f"text_encoder.encoder.layers.2.self_attn.{p}_proj" for p in ("k", "v", "q", "out")]
    for name, layer in layers.items():
        a, b = factors(layer)
        if name in idle:
            assert not b.any()
            continue
        u, s, vh = torch.linalg.svd(weights[name].grad / batches)
        torch.testing.assert_close(a.T @ a, vh[:RANK].T @ vh[:RANK], rtol=0, atol=5e-3)
        outputs = len(b)
        second = u[:, RANK : 2 * RANK] * s[RANK : 2 * RANK] * outputs**0.25 / 16**0.5
        torch.testing.assert_close(b @ b.T, second @ second.T, rtol=0, atol=0.02 * s[0].item() ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_outputs_and_gradients_are_those_of_peft_on_the_changed_base(kind, use_rslora):
    twin = build_unet()
    twin.requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": use_rslora}
    twin.add_adapter(LoraConfig(target_modules=UNET_TARGETS, init_lora_weights=kind, **settings))
    unet = start(kind, use_rslora=use_rslora)["unet"]
    gradients = []
    for model in (unet, twin):
        move({"unet": model})
        output = model(**unet_inputs()).sample
        output.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"y": output})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "lora_ga"])
def test_noise_is_scaled_by_the_whole_merged_weight(kind):
    models = copy.deepcopy(started(kind))
    move(models)
    flat = FlatLoRA(models["unet"], sigma=0.3, total_steps=10, schedule="constant")
    for name, layer in flat.layers.items():
        merged = layer.get_base_layer().weight.detach().clone()
        for adapter in (ADAPTER, FROZEN_ADAPTER):
            a, b = factors(layer, adapter)
            merged += layer.scaling[adapter] * b @ a
        expected = 0.3 * merged.norm(dim=1) / merged.shape[1] ** 0.5
        torch.testing.assert_close(flat.row_std(name), expected)


def test_the_frozen_adapter_has_no_dropout():
    models = start("pissa", lora_dropout=0.5)
    for layer in lora_layers(models).values():
        assert isinstance(layer.lora_dropout[ADAPTER], nn.Dropout)
        assert isinstance(layer.lora_dropout[FROZEN_ADAPTER], nn.Identity)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_left_as_it_is(kind, bits):
    bnb = pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear, x = nn.Linear(64, 48), torch.randn(5, 64)
    model = nn.Module()
    if bits == 4:
        model.to_q = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
        model.to_q.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        model.to_q = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
        model.to_q.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    model.to_q.bias = linear.bias
    model.to_q.to("cpu")  # which quantises
    expected, weight = model.to_q(x), model.to_q.weight
    before = weight.data.clone()
    setattr(model, f"is_loaded_in_{bits}bit", True)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"])
    model.peft_config = {ADAPTER: config}
    # What diffusers' and transformers' models have.
    model.add_adapter = lambda config, adapter_name: inject_adapter_in_model(config, model, adapter_name)
    model.set_adapter = lambda names: model.to_q.set_adapter(names)
    model.add_adapter(config, ADAPTER)
    with pytest.raises(UserError, match=r"gradients of the base, and unet\.to_q is quantised"):
        check({"unet": model}, "lora_ga")
    check({"unet": model}, kind)
    initialise({"unet": model}, kind, seed=0, batch_size=1, loss=loss_of)
    subtract_initial_update({"unet": model})
    torch.testing.assert_close(model.to_q(x), expected, rtol=0, atol=1e-5)
    assert model.to_q.base_layer.weight is weight and torch.equal(weight.data, before)
    a, b = factors(model.to_q)
    assert (b @ a).norm() > 0.5


# The file.


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_file_is_one_lora_of_the_original_base(base_path, tmp_path, use_rslora):
    base = load_base(str(base_path))
    models = {"unet": base.unet} | dict(zip(TEXT_ENCODERS, base.text_encoders, strict=True))
    start("pissa", models, use_rslora=use_rslora)
    move(models)
    for model in models.values():
        model.eval()

    def outputs(unet: nn.Module, *encoders: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            prompts = encode_prompts(base.tokenizers, encoders, ["a icon"])
            return [unet(**unet_inputs()).sample, prompts.tokens, prompts.pooled]

    expected = outputs(*models.values())
    (tmp_path / WEIGHTS_NAME).write_bytes(adapter_bytes(models, {}))
    convert(tmp_path / WEIGHTS_NAME, tmp_path / "kohya.safetensors", layers_per_block=1)
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    for part in models:
        assert metadata[f"{part}.r"] == 2 * RANK
        assert metadata[f"{part}.lora_alpha"] == pytest.approx(ALPHA * (2**0.5 if use_rslora else 2))
        assert metadata[f"{part}.init_lora_weights"] is True  # a reader must not decompose its base again
    bare = without_adapters({"unet": build_unet()})
    for name in (WEIGHTS_NAME, "kohya.safetensors"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        loaded = outputs(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        for one, other in zip(loaded, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert_equal(without_adapters({"unet": pipeline.unet}), bare)


@pytest.mark.slow
def test_a_checkpoint_gives_both_adapters_back_bit_for_bit():
    models = start("pissa")
    move(models)
    tensors = adapter_tensors(models)
    other = start("olora")
    load_adapter_tensors(other, tensors)
    for name, layer in lora_layers(models).items():
        for adapter in (ADAPTER, FROZEN_ADAPTER):
            restored = factors(lora_layers(other)[name], adapter)
            assert all(map(torch.equal, restored, factors(layer, adapter)))
    assert not any(
        p.requires_grad for m in other.values() for n, p in m.named_parameters() if FROZEN_ADAPTER in n
    )
    with pytest.raises(UserError, match="another rank"):
        load_adapter_tensors(start("gaussian"), tensors)


# A run.


def learner(config: TrainConfig, **changes) -> Learner:
    samples = find_samples(images.Path(config.instance_data_dir), config.instance_prompt)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    return Learner(dataclasses.replace(config, **changes), accelerator, samples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eva", "lora_ga"])
def test_every_process_and_arm_starts_the_same(config, monkeypatch, kind):
    config = dataclasses.replace(config, init_lora_weights=kind, lora_layers=("to_q",))
    monkeypatch.setattr(initialising, "LORA_GA_SAMPLES", 4)
    first = adapter_tensors(learner(config).trained)
    monkeypatch.setattr(Accelerator, "process_index", property(lambda self: 1))
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    other = learner(config, flat_sigma=0.0, gradient_checkpointing=True, lora_dropout=0.5)
    for name, tensor in adapter_tensors(other.trained).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_factors_are_exact_on_a_base_in_bf16(config, base_path):
    trained = learner(dataclasses.replace(config, mixed_precision="bf16", init_lora_weights="pissa")).trained
    base = load_base(str(base_path), dtype=torch.bfloat16)
    assert_equal(without_adapters(trained), without_adapters({"unet": base.unet}))
    for layer in lora_layers(trained).values():
        a, b = factors(layer)
        assert a.dtype == b.dtype == torch.float32
        assert not torch.equal(a, a.bfloat16().float())
        u, s, vh = torch.linalg.svd(layer.get_base_layer().weight.float())
        torch.testing.assert_close(b @ a, u[:, :RANK] * s[:RANK] @ vh[:RANK], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_takes_its_start_from_the_checkpoint(config, tmp_path, monkeypatch):
    config = dataclasses.replace(
        config,
        max_train_steps=3,
        init_lora_weights="pissa",
        train_text_encoder=True,
        lora_dropout=0.2,
        text_encoder_lr=1e-3,
    )
    undisturbed = run(config)
    started = adapter_tensors(learner(config).trained)
    moved = 0
    for name, tensor in undisturbed.items():
        dim = 0 if ".lora_A." in name or ".down." in name or "linear_layer.down" in name else 1
        (now, frozen), (a0, minus_b0) = tensor.chunk(2, dim), started[name].chunk(2, dim)
        assert torch.equal(frozen, minus_b0)
        moved += not torch.equal(now, a0)
    assert moved > 0.8 * len(undisturbed)

    config = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    stop_after(config, 2)

    def fail(*arguments, **settings):
        raise AssertionError("computed again")

    monkeypatch.setattr(learners, "initialise", fail)
    assert_equal(run(config, resume_from_checkpoint="latest"), undisturbed)
    settings = json.loads((tmp_path / "resumed" / "checkpoint-2" / "state.json").read_text())["settings"]
    assert settings["init_lora_weights"] == "pissa"
    with pytest.raises(UserError, match="init_lora_weights 'pissa' then and 'olora' now"):
        find_checkpoint(tmp_path / "resumed", "latest", settings | {"init_lora_weights": "olora"})
    assert record.read_facts(tmp_path / "resumed" / WEIGHTS_NAME)["init_lora_weights"] == "pissa"


# What is refused.


def test_kinds_of_the_configuration(config):
    for kind in KINDS:
        assert dataclasses.replace(config, init_lora_weights=kind).starts_with_update == (kind in SUBTRACTED)


@pytest.mark.parametrize("kind", ["kaiming", "pissa_niter", "pissa_niter_0", "Gaussian", "true"])
def test_other_kinds_are_refused(config, kind):
    with pytest.raises(UserError, match=f"^--init_lora_weights {kind}: must be gaussian, default, pissa, "):
        dataclasses.replace(config, init_lora_weights=kind)


@pytest.mark.parametrize("kind", SUBTRACTED)
@pytest.mark.parametrize("other", [{"use_dora": True}, {"scale_weight_norms": 1.0}])
def test_combinations_without_a_meaning_are_refused(config, kind, other):
    (flag,) = other
    with pytest.raises(UserError, match=f"^--{flag} with --init_lora_weights {kind}: .*leave out one"):
        dataclasses.replace(config, init_lora_weights=kind, **other)


@pytest.mark.parametrize("kind", ["eva", *SUBTRACTED])
def test_convolutions_are_refused(kind):
    with pytest.raises(UserError, match=rf"^--init_lora_weights {kind}: unet\.\S+conv1 is no linear layer"):
        start(kind, unet_targets=["to_q", "conv1"])


@pytest.mark.parametrize(("kind", "most"), [("pissa", 32), ("olora", 32), ("eva", 16), ("lora_ga", 16)])
def test_a_rank_that_a_layer_has_not_is_refused(kind, most):
    check(start("gaussian", rank=most), kind)
    with pytest.raises(UserError, match=f"too small for --rank {most + 1}; give a rank of at most {most},"):
        check(start("gaussian", rank=most + 1), kind)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("eva", "lora_ga")])
def test_layers_with_ranks_of_their_own_start_too(kind):
    targets = ["to_q", ("down_blocks.*.to_q", 2), ("mid_block.*.to_q", 6)]
    models, few = {"unet": build_unet()}, {"unet": build_unet()}

    def loss(number):
        return models["unet"](**unet_inputs(seed=number)).sample.square().mean()

    for own in (models, few):
        own["unet"].requires_grad_(False).train()
    add_lora(models, rank=RANK, alpha=None, seed=0, unet_targets=targets, init_lora_weights=True)
    check(models, kind)
    initialise(models, kind, seed=0, batch_size=2, loss=loss)
    ranks = {name: layer.r[ADAPTER] for name, layer in lora_layers(models).items()}
    assert set(ranks.values()) == {2, RANK, 6}
    if kind == "eva":
        for name, layer in lora_layers(models).items():
            a = layer.lora_A[ADAPTER].weight
            torch.testing.assert_close(a @ a.T, torch.eye(ranks[name]), rtol=0, atol=1e-4)
        return
    subtract_initial_update(models)
    add_lora(few, rank=RANK, alpha=None, seed=0, unet_targets=targets, init_lora_weights=True)
    inputs = unet_inputs()
    torch.testing.assert_close(
        models["unet"](**inputs).sample, few["unet"](**inputs).sample, rtol=0, atol=1e-4
    )


def test_gradients_in_fp16_are_refused():
    models = build_models()
    models["unet"].half()
    with pytest.raises(UserError, match=r"lora_ga: .*unet\.\S+ is torch\.float16.*use a base in bf16"):
        start("lora_ga", models)


def test_gradients_that_are_not_finite_are_refused(monkeypatch):
    models = build_models()
    models["unet"].conv_out.weight.data[0, 0, 0, 0] = float("nan")
    monkeypatch.setattr(initialising, "LORA_GA_SAMPLES", 1)
    with pytest.raises(UserError, match=r"lora_ga: the gradient of \S+_proj isn't finite"):
        start("lora_ga", models)


@pytest.mark.slow
def test_eva_needs_inputs_enough(monkeypatch):
    with pytest.raises(UserError, match=r"time_emb_proj has 2 inputs in a batch, and --rank 4 takes 8"):
        start("eva", unet_targets=["to_q", "time_emb_proj"])
    monkeypatch.setattr(initialising, "EVA_PASSES", 2)
    with pytest.raises(UserError, match="have not settled after 2 batches"):
        start("eva")
