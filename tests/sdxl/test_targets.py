"""Which layers get a LoRA: ends of names, patterns, ranks of their own; and files that readers understand."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from flatlora_diffusion.adapter.check import check_adapter, check_loaded
from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes, adapter_tensors, load_adapter_tensors
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.output.names import KOHYA_NAME
from flatlora_diffusion.sdxl.initialise import initialise, subtract_initial_update
from flatlora_diffusion.sdxl.lora import ADAPTER, UNET_TARGETS, add_lora, select
from flatlora_diffusion.train.arms import train
from tests.tiny import assert_equal, build_unet, run, stop_after, unet_inputs

TARGETS = [*UNET_TARGETS, ("mid_block.*", 6), ("up_blocks.0.attentions.[01].*.attn1.*", 3), ("attn1.to_v", 2)]
LINEAR = [*UNET_TARGETS, ("mid_block.*.to_*", 6)]


def layers_of(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def adapted(alpha=None, targets=TARGETS, start=None, **settings):
    """A UNet with an adapter far from zero."""
    unet = build_unet()
    unet.requires_grad_(False)
    settings = {"rank": 4, "seed": 0, "unet_targets": targets, "init_lora_weights": True} | settings
    add_lora({"unet": unet}, alpha=alpha, **settings)
    if start:
        initialise({"unet": unet}, start, seed=0, batch_size=1, loss=lambda number: None)
        subtract_initial_update({"unet": unet})
    draw = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return unet.eval()


def test_names_are_ends_and_patterns_and_the_last_rank_counts():
    unet = build_unet()
    found = select(unet, [("to_k", None), ("down_blocks.*.to_?", 8), ("attn2.to_k", 2), ("to_k", None)])
    for name, _ in unet.named_modules():
        if name.endswith(".to_k"):
            own = 2 if "attn2" in name else 8 if name.startswith("down_blocks") else None
            assert found.pop(name) == own, name
        elif name.startswith("down_blocks") and name.endswith((".to_q", ".to_v")):
            assert found.pop(name) == 8
    assert not found
    block = select(unet, [("mid_block.*", 8)])
    assert {"mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"} < block.keys()
    assert all(name.startswith("mid_block.") for name in block)


def test_plain_names_give_the_settings_of_before():
    unet = adapted(alpha=6.0, targets=["to_q", "ff.net.2"])
    config = unet.peft_config[ADAPTER]
    assert config.target_modules == {"to_q", "ff.net.2"}
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (4, 6.0, {}, {})


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (6.0, False), (6.0, True), (None, True)])
def test_a_layer_is_scaled_by_alpha_over_its_own_rank(alpha, rslora):
    layers = layers_of(adapted(alpha, use_rslora=rslora))
    expected = select(build_unet(), [(t, None) if isinstance(t, str) else t for t in TARGETS])
    assert layers.keys() == expected.keys() and set(expected.values()) == {None, 6, 3, 2}
    for name, layer in layers.items():
        rank = expected[name] or 4
        assert layer.r[ADAPTER] == rank == len(layer.lora_A[ADAPTER].weight)
        root = rank**0.5 if rslora else rank
        assert layer.scaling[ADAPTER] == pytest.approx((alpha or rank) / root)


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("to_z", "there are .*to_k.*to_q"),
        ("down_block.1.*", r"near it are down_blocks\.1\.\*"),
        ("up_blocks.7.*", r"near it are up_blocks\.[01]\.\*"),
        ("attn1.to_qq", r"near it are attn1\.to_q"),
        ("*zzz*", r"there are down_blocks\.\*, up_blocks\.\*, mid_block\.\*|there are .*mid_block\.\*"),
    ],
)
def test_what_fits_nothing_is_told_in_a_line_with_what_is_near(target, near):
    with pytest.raises(UserError, match=near) as caught:
        select(build_unet(), [("to_q", None), (target, 8)])
    assert str(caught.value).startswith(f"--lora_layers {target}: no ") and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 6.0},
        {"alpha": 6.0, "use_rslora": True},
        {"use_dora": True},
        {"start": "pissa", "alpha": 3, "targets": LINEAR},
    ],
)
def test_files_load_in_diffusers_as_they_were_trained(settings, base_path, tmp_path):
    unet = adapted(**settings)
    file, kohya = tmp_path / WEIGHTS_NAME, tmp_path / KOHYA_NAME
    file.write_bytes(adapter_bytes({"unet": unet}, {}))
    with torch.no_grad():
        expected = unet(**unet_inputs()).sample
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path, weight_name=WEIGHTS_NAME, adapter_name="one")
    check_loaded(pipeline, "one", check_adapter(pipeline, file))
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(**unet_inputs()).sample, expected, rtol=1e-5, atol=1e-6)

    convert(file, kohya, 1)
    convert(kohya, tmp_path / "back.safetensors", 1)
    assert_equal(load_file(tmp_path / "back.safetensors"), load_file(file))
    for name, layer in layers_of(unet).items():
        if name == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q":
            named, own = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", load_file(kohya)
            factor = own[f"{named}.alpha"].item() / len(own[f"{named}.lora_down.weight"])
            assert factor == pytest.approx(layer.scaling[ADAPTER])
    if "alpha" in settings and not {"use_rslora", "start"} & settings.keys():
        # diffusers reads kohya's alphas where they are the same for all layers.
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(tmp_path, weight_name=KOHYA_NAME, adapter_name="two")
        with torch.no_grad():
            torch.testing.assert_close(pipeline.unet(**unet_inputs()).sample, expected, rtol=1e-5, atol=1e-6)


def test_tensors_come_back_bit_for_bit():
    kept = adapter_tensors({"unet": adapted()})
    other = {"unet": adapted(seed=1)}
    load_adapter_tensors(other, kept)
    assert_equal(adapter_tensors(other), kept)
    with pytest.raises(UserError, match="another rank"):
        load_adapter_tensors({"unet": adapted(targets=UNET_TARGETS)}, kept)


@pytest.mark.slow
def test_a_run_resumes_starts_from_a_file_and_tells_its_layers(config, tmp_path):
    words = ("to_k, to_q", "mid_block.*.attn1.*=6", "up_blocks.0.*.to_q=2")
    config = dataclasses.replace(config, lora_layers=words, max_train_steps=3, output_kohya_format=True)
    whole = run(config)
    again = {"output_dir": str(tmp_path / "again")}
    stop_after(config, 1, **again)
    with pytest.raises(UserError, match=r"belongs to other settings .*lora_layers"):
        run(config, lora_layers=("to_k", "to_q"), resume_from_checkpoint="latest", **again)
    with pytest.raises(UserError, match=r"belongs to other settings \(lora_alpha 'the rank of each layer'"):
        run(config, lora_alpha=4.0, resume_from_checkpoint="latest", **again)
    assert_equal(run(config, resume_from_checkpoint="latest", **again), whole)
    card = Path(config.output_dir, "README.md").read_text()
    assert "on to_k to_q mid_block.*.attn1.*=6 up_blocks.0.*.to_q=2" in card

    for number, name in enumerate((WEIGHTS_NAME, KOHYA_NAME)):
        start = {"lora_weights": f"{config.output_dir}/{name}", "output_dir": str(tmp_path / str(number))}
        train(
            dataclasses.replace(config, learning_rate=0.0, adam_weight_decay=0.0, max_train_steps=1, **start)
        )
        assert_equal(load_file(f"{start['output_dir']}/{WEIGHTS_NAME}"), whole)
    for changes, message in (
        ({"lora_layers": (*words[:2], "up_blocks.0.*.to_q=3")}, r"is \[2, \d+\] there and \[3, \d+\] here"),
        ({"lora_alpha": 12.0}, r"scale \(alpha / rank\) 1 there and 2, 3, 6 here"),
    ):
        with pytest.raises(UserError, match=message):
            run(config, **(start | {"output_dir": str(tmp_path / "x")} | changes))
