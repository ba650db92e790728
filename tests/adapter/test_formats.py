"""Adapter files of other programs: the update that a file means is the one that is loaded, or it is named."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flatlora_diffusion.adapter.check import check_adapter
from flatlora_diffusion.adapter.file import PEFT_NAME
from flatlora_diffusion.adapter.formats import PEFT_CONFIG_NAME
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from tests.tiny import build_pipeline, build_text_encoders, build_unet

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PROJ_IN = "down_blocks.1.attentions.0.proj_in"
CONV = "down_blocks.1.resnets.0.conv1"
FC1 = "text_model.encoder.layers.1.mlp.fc1"


def kohya(part, path):
    return f"{part}_{path.replace('.', '_')}"


def merged(pipeline, name, part, path):
    """The layer's weight with the loaded adapter merged by PEFT, and without it."""
    model = getattr(pipeline, part)
    try:
        layer = model.get_submodule(path)
    except AttributeError:  # newer transformers
        layer = model.get_submodule(path.removeprefix("text_model."))
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge(adapter_names=[name])
    after = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    return before, after


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor(2, dtype=torch.int32), torch.tensor(3.5)])
@pytest.mark.parametrize("dora", [False, True])
def test_of_kohya_mean_what_is_loaded(alpha, dora, tmp_path):
    # A linear layer stored as a convolution, one as it is, a convolution, a text encoder; all alphas differ.
    stored = {
        "unet": {TO_Q: (random(8, 64, 1, 1, seed=1), random(64, 8, 1, 1, seed=2), alpha)},
        "text_encoder_2": {FC1: (random(2, 32, seed=3), random(37, 2, seed=4), torch.tensor(5))},
    }
    stored["unet"][PROJ_IN] = (random(3, 64, seed=5), random(64, 3, seed=6), torch.tensor(1.0))
    stored["unet"][CONV] = (random(2, 32, 3, 3, seed=7), random(64, 2, 1, 1, seed=8), torch.tensor(7))
    tensors, magnitudes = {}, {}
    for part, layers in stored.items():
        for path, (down, up, own) in layers.items():
            name = kohya("lora_unet" if part == "unet" else "lora_te2", path)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": own}
            if dora:
                magnitudes[path] = random(len(up), *[1] * (down.ndim - 1), seed=9).abs() + 1
                tensors[f"{name}.dora_scale"] = magnitudes[path]
    file = tmp_path / "theirs.safetensors"
    save_file(tensors, file)
    pipeline = build_pipeline()
    facts = load_adapter(pipeline, "theirs", file)
    assert (facts.layers, facts.dora, facts.parts) == (4, dora, ("unet", "text_encoder_2"))
    for part, layers in stored.items():
        for path, (down, up, own) in layers.items():
            before, after = merged(pipeline, "theirs", part, path)
            update = own.item() / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
            expected = before + update
            if dora:
                norms = expected.flatten(1).norm(dim=1)
                scale = magnitudes[path].flatten() / norms
                expected = expected * scale.reshape(-1, *[1] * (before.ndim - 1))
            torch.testing.assert_close(after, expected, msg=path)


def test_of_diffusers_may_store_linear_layers_as_convolutions(tmp_path):
    down, up = random(4, 64, 1, 1, seed=1), random(64, 4, 1, 1, seed=2)
    file = tmp_path / "theirs.safetensors"
    save_file({f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}, file)
    pipeline = build_pipeline()
    load_adapter(pipeline, "theirs", file)
    before, after = merged(pipeline, "theirs", "unet", TO_Q)
    torch.testing.assert_close(after - before, up[:, :, 0, 0] @ down[:, :, 0, 0])


def saved_by_peft(folder, part="unet", slim=False, **settings):
    """What PEFT's own `save_pretrained` writes, and the merged weights of its model."""
    one, two = build_text_encoders()
    model = {"unet": build_unet(slim=slim), "text_encoder": one, "text_encoder_2": two}[part]
    targets = ["to_q", "attn2.to_k", "conv1"] if part == "unet" else ["q_proj", "fc2"]
    own = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False} | settings
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**own))
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("unet", {}),
        ("unet", {"use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"conv1": 3}}),
        ("unet", {"use_dora": True}),
        ("text_encoder", {}),
        ("text_encoder_2", {"use_dora": True}),
    ],
)
def test_of_peft_mean_what_is_loaded(part, settings, tmp_path):
    expected = saved_by_peft(tmp_path / part, part, **settings)
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / part / PEFT_NAME))
    pipeline = build_pipeline()
    facts = load_adapter(pipeline, "theirs", tmp_path / part)
    assert (facts.parts, facts.dora) == ((part,), bool(settings.get("use_dora")))
    back = tmp_path / "kohya.safetensors"
    convert(facts.file, back, 1)
    load_adapter(pipeline, "back", back)
    for name in ("theirs", "back"):
        layers = [p for p, m in getattr(pipeline, part).named_modules() if name in getattr(m, "lora_A", ())]
        assert len(layers) == facts.layers
        for path in layers:
            torch.testing.assert_close(
                merged(pipeline, name, part, path)[1], expected[f"{path}.weight"], msg=path
            )


def test_of_peft_need_their_configuration(tmp_path):
    saved_by_peft(tmp_path)
    config = tmp_path / PEFT_CONFIG_NAME
    sound = json.loads(config.read_text())
    pipeline = build_pipeline()
    for text, message in (
        (json.dumps(sound | {"peft_type": "LOHA"}), "peft_type 'LOHA'; only LoRA"),
        (json.dumps(sound | {"init_lora_weights": "pissa"}), "init_lora_weights 'pissa'.* changes the base"),
        (json.dumps(sound | {"r": 5}), "rank 4, in the metadata 5"),
        ("{", "adapter_config.json: not JSON"),
        (None, "adapter_config.json: cannot be read .*put it beside it"),
    ):
        config.unlink() if text is None else config.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            check_adapter(pipeline, tmp_path)
        assert "\n" not in str(caught.value)


def test_of_peft_for_a_text_encoder_need_a_name_where_both_are_alike(tmp_path):
    saved_by_peft(tmp_path / "mine", "text_encoder")
    with pytest.raises(UserError, match="save it in a folder text_encoder or text_encoder_2"):
        check_adapter(build_pipeline(), tmp_path / "mine")


Q = kohya("lora_unet", TO_Q)
ONE = torch.ones(1)
NAMED = {
    "OneTrainer's embeddings": ({f"{Q}.alpha": ONE, "bundle_emb.<x>.clip_l": ONE}, "bundled by OneTrainer"),
    "OneTrainer's names": (
        {"unet.input_blocks.4.1.proj_in.lora_down.weight": ONE, "clip_l.x.alpha": ONE},
        "OneTrainer's own format.*scripts/convert_model.py to LEGACY_SAFETENSORS",
    ),
    "OneTrainer's text encoders": (
        {"lora_te1.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": ONE},
        "OneTrainer",
    ),
    "LoKr": ({f"{Q}.lokr_w1": ONE, f"{Q}.lokr_w2_a": ONE, f"{Q}.alpha": ONE}, "LoKr.*merge.py"),
    "LoHa": ({f"{Q}.hada_w1_a": ONE, f"{Q}.hada_t1": ONE}, "LoHa.*extract_lora_from_models.py"),
    "IA3": ({f"{Q}.weight": ONE, f"{Q}.on_input": ONE}, "IA3"),
    "full": ({f"{Q}.diff": ONE, f"{Q}.diff_b": ONE}, "full difference"),
    "norms": ({"lora_unet_out_0.w_norm": ONE}, "trained norm"),
    "GLoRA": ({f"{Q}.a1.weight": ONE, f"{Q}.b2.weight": ONE}, "GLoRA"),
    "OFT": ({f"{Q}.oft_blocks": ONE, f"{Q}.alpha": ONE}, "OFT"),
    "Tucker": ({f"{Q}.lora_mid.weight": ONE, f"{Q}.lora_down.weight": ONE}, "Tucker"),
    "DoRA of the inputs": (
        {
            f"{Q}.lora_down.weight": torch.ones(4, 64),
            f"{Q}.lora_up.weight": torch.ones(64, 4),
            f"{Q}.dora_scale": torch.ones(1, 64),
        },
        r"scales the inputs.*--rank N --base BASE",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_of_other_kinds_are_named(case, tmp_path):
    tensors, message = NAMED[case]
    file = tmp_path / "theirs.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)
    for refuse in (
        lambda: load_adapter(build_pipeline(), "theirs", file),
        lambda: convert(file, tmp_path / "out.safetensors", 1),
    ):
        with pytest.raises(UserError, match=message) as caught:
            refuse()
        assert str(caught.value).startswith(f"{file}: ")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
