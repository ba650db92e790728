"""The core knows nothing of diffusion: T5, CLIP's vision transformer and Llama, the paper's other models."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from flatlora_diffusion import FlatLoRA
from tests.flat.test_flat_lora import (
    SIGMA,
    assert_same_outcome,
    base_tensors,
    outcome,
    twin_of,
    with_both_sources,
)

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def t5():
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def run_t5(model):
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :5], use_cache=False).logits, None


def clip_vision():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModel(config)


def run_clip_vision(model):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    return model(pixel_values=pixels).last_hidden_state, pixels


def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def run_llama(model):
    return model(input_ids=IDS, use_cache=False).logits, None


TARGETS = {
    t5: ["q", "k", "v", "o", "wi", "wo"],
    clip_vision: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    llama: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
}
RUNS = {t5: run_t5, clip_vision: run_clip_vision, llama: run_llama}


def adapted(architecture, wrapped):
    """The tiny model with a LoRA far from zero, through either of the two usual ways."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[architecture], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = architecture().requires_grad_(False)
        if wrapped:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(config)
    return model.double().train()


for_every_model = pytest.mark.parametrize(
    ("build", "run"),
    [
        pytest.param(
            functools.partial(adapted, architecture, wrapped),
            run,
            id=f"{architecture.__name__}, {'get_peft_model' if wrapped else 'add_adapter'}",
        )
        for architecture, run in RUNS.items()
        for wrapped in (True, False)
    ],
)


def attach(model, **settings):
    return FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant", seed=2, **settings)


@for_every_model
@with_both_sources
def test_equals_a_twin_with_materialised_noise(build, run, noise):
    model = build()
    flat = attach(model, noise=noise)
    plain, actual = outcome(build(), run), outcome(model, run)
    assert_same_outcome(actual, outcome(twin_of(model, flat), run))
    assert (actual[0] - plain[0]).norm() / plain[0].norm() > 0.01, "the noise must show"


@for_every_model
def test_every_adapted_layer_is_perturbed(build, run):
    model = build()
    flat = attach(model)
    adapted_layers = {
        name.rpartition(".lora_B")[0] for name, _ in model.named_parameters() if "lora_B" in name
    }
    assert flat.layers.keys() == adapted_layers


@for_every_model
def test_gradient_checkpointing_sees_the_same_noise(build, run):
    model = build()
    # The twin has it too: T5's gradients, summed in another order, differ in the sixth digit.
    model.activation_checkpointing_enable({"use_reentrant": False})
    flat = attach(model)
    actual = outcome(model, run)
    assert_same_outcome(actual, outcome(twin_of(model, flat), run))


@for_every_model
def test_eval_has_the_bits_of_a_model_without_noise(build, run):
    model, plain = build(), outcome(build().eval(), run)
    attach(model)
    assert not torch.equal(run(model)[0], plain[0])
    model.eval()
    actual = outcome(model, run)
    assert torch.equal(actual[0], plain[0])
    assert all(torch.equal(actual[1][name], gradient) for name, gradient in plain[1].items())


@for_every_model
def test_base_weights_are_never_written_and_remove_restores_everything(build, run):
    model = build()
    run(model)  # transformers installs hooks of its own at the first call
    before = base_tensors(model)
    modules = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for name, m in model.named_modules()
    }
    flat = attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        outcome(model, run)
        optimizer.step()
        flat.step()
    flat.remove()
    after = base_tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_" not in name)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_" in name)
    for name, module in model.named_modules():
        counts = len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__
        assert counts == modules[name]
    untouched = build()
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(run(model)[0], run(untouched)[0]), "without noise again"
