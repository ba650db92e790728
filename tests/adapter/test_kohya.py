"""LoRA files in kohya's format and back."""

import itertools
import json
import logging
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from flatlora_diffusion.adapter import kohya_names
from flatlora_diffusion.adapter.command import main
from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes, adapter_tensors, with_sorted_metadata
from flatlora_diffusion.adapter.kohya import PEFT_METADATA_KEY, convert, from_kohya, to_kohya
from flatlora_diffusion.adapter.kohya_names import PREFIXES, layer_names
from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from tests.tiny import (
    TEXT_TARGETS,
    UNET_TARGETS,
    add_lora,
    build_pipeline,
    build_text_encoders,
    build_unet,
)

# Written by hand, of names that sd-scripts gives to the layers of SDXL.
SDXL_NAMES = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k": (
        "input_blocks_5_1_transformer_blocks_1_attn2_to_k"
    ),
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_out.0": (
        "input_blocks_7_1_transformer_blocks_9_attn1_to_out_0"
    ),
    "down_blocks.2.attentions.1.transformer_blocks.3.ff.net.0.proj": (
        "input_blocks_8_1_transformer_blocks_3_ff_net_0_proj"
    ),
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
    "mid_block.attentions.0.proj_out": "middle_block_1_proj_out",
    "mid_block.attentions.0.transformer_blocks.5.attn2.to_v": (
        "middle_block_1_transformer_blocks_5_attn2_to_v"
    ),
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.resnets.0.conv1": "output_blocks_0_0_in_layers_2",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (
        "output_blocks_0_1_transformer_blocks_0_ff_net_2"
    ),
    "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_k": (
        "output_blocks_2_1_transformer_blocks_9_attn1_to_k"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.1.transformer_blocks.1.attn1.to_v": (
        "output_blocks_4_1_transformer_blocks_1_attn1_to_v"
    ),
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
}
TEXT_NAMES = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    ),
    "text_encoder.text_model.encoder.layers.11.mlp.fc2": "lora_te1_text_model_encoder_layers_11_mlp_fc2",
    "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj": (
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"
    ),
    "text_encoder_2.text_projection": "lora_te2_text_projection",
}
CONVOLUTIONS = ["conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"]


@pytest.fixture(autouse=True)
def separate_runs(monkeypatch):
    """Leave the settings of the process as they were."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    levels = {name: logging.getLogger(name).level for name in ("httpx", "accelerate")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def layer(name, *, rank=2, size=3, ones=()):
    """The weights of a layer in the diffusers format."""
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.lora_A.weight": torch.randn(rank, size, *ones, generator=generator),
        f"{name}.lora_B.weight": torch.randn(size + 1, rank, *ones, generator=generator),
    }


def kohya_layer(name, *, rank=2, alpha=1.0, ones=()):
    weights = {"lora_down.weight": torch.randn(rank, 3, *ones), "lora_up.weight": torch.randn(4, rank, *ones)}
    return {f"{name}.{key}": value for key, value in (weights | {"alpha": torch.tensor(alpha)}).items()}


def names_of(tensors):
    return {key.partition(".")[0] for key in tensors}


def convert_names(names, layers_per_block=2):
    """Each layer converted by itself: its name -> the one in kohya's format."""
    return {name: names_of(to_kohya(layer(name), None, layers_per_block)).pop() for name in names}


def models_with_lora(kind, unet=None):
    """Small models with adapters far from zero, of one of the kinds that are told apart."""
    text_settings, settings = {}, {}
    targets = UNET_TARGETS
    if kind == "patterns":
        settings = {
            "rank_pattern": {"to_q": 2, "down_blocks.1.attentions.0.proj_in": 3},
            "alpha_pattern": {"attn2.to_k": 5, "to_out.0": 0.7},
        }
        targets = [*UNET_TARGETS, "proj_in"]
        text_settings = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"layers.1.self_attn.k_proj": 3}}
    elif kind == "convolutions":
        targets = [*UNET_TARGETS, *CONVOLUTIONS, "time_emb_proj", "ff.net.2", "linear_1", "upsamplers.0.conv"]
    elif kind == "dora":
        targets, settings = [*UNET_TARGETS, *CONVOLUTIONS], {"use_dora": True}
        text_settings = {"use_dora": True}
    elif kind == "rslora":
        settings = {"use_rslora": True}
    models = {"unet": unet or build_unet()}
    text_targets = TEXT_TARGETS
    if kind == "perceptrons":
        targets, text_targets = ["ff.net.0.proj", "ff.net.2"], ["fc1", "fc2"]
    if kind != "unet":
        models["text_encoder"], models["text_encoder_2"] = build_text_encoders()
        add_lora(models["text_encoder"], text_targets, **text_settings)
        add_lora(models["text_encoder_2"], text_targets, r=2, lora_alpha=2)
    add_lora(models["unet"], targets, **settings)
    return models


KINDS = ["unet", "text encoders", "patterns", "convolutions", "dora", "rslora"]


def with_peft_names(tensors):
    """The UNet's names as PEFT writes them: diffusers passes over the attention in files with both kinds."""
    if all("lora_B" not in key for key in tensors):
        return tensors
    return {
        key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): tensor
        for key, tensor in tensors.items()
    }


def write(path, models, facts=None):
    """The file that export writes, with PEFT's names where it would mix them with others."""
    path.write_bytes(adapter_bytes(models, facts or {}))
    metadata = metadata_of(path)
    path.write_bytes(with_sorted_metadata(save(with_peft_names(load_file(path)), metadata=metadata)))


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


class TestNames:
    def test_of_sdxl_are_those_written_by_hand(self):
        expected = {f"unet.{path}": f"lora_unet_{name}" for path, name in SDXL_NAMES.items()} | TEXT_NAMES
        assert convert_names(expected) == expected

    def test_of_every_layer_of_sdxl_are_those_that_diffusers_reads_from_checkpoints(self):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                transformer_layers_per_block=(1, 2, 10),
                projection_class_embeddings_input_dim=2816,
                cross_attention_dim=2048,
            )
        paths = {name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
        assert len(paths) == 794
        # The checkpoint of Stability's model is written down here; diffusers' own reader renames its layers.
        checkpoint = {
            f"model.diffusion_model.{name}.{kind}": name
            for name in sgm_layers()
            for kind in ("weight", "bias")  # it looks for some biases
        }
        read = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
        expected = {
            f"unet.{key.removesuffix('.weight')}": f"lora_unet_{name}".replace(".", "_")
            for key, name in read.items()
            if key.endswith(".weight")
        }
        assert {name.removeprefix("unet.") for name in expected} == paths
        assert convert_names(expected) == expected
        assert len(set(expected.values())) == 794

    @pytest.mark.parametrize("layers_per_block", [1, 2, 3])
    def test_are_one_to_one_in_both_spellings(self, layers_per_block):
        names = kohya_names.kohya_names(layers_per_block)
        assert len(names) > 5_000
        assert len(set(names.values())) == len(names)
        found = layer_names(layers_per_block)
        for (part, path), name in names.items():
            # No spelling of one layer is a spelling of another.
            assert found[name] == (part, path)
            assert found[f"{PREFIXES[part]}_{path}".replace(".", "_")] == (part, path)

    @pytest.mark.parametrize("layers_per_block", [1, 2])
    def test_follow_the_layers_of_a_block(self, layers_per_block):
        row = layers_per_block + 1
        assert convert_names(
            [
                "unet.down_blocks.1.resnets.0.conv1",
                "unet.down_blocks.1.downsamplers.0.conv",
                "unet.up_blocks.1.attentions.0.proj_in",
                "unet.up_blocks.1.upsamplers.0.conv",
            ],
            layers_per_block,
        ) == {
            "unet.down_blocks.1.resnets.0.conv1": f"lora_unet_input_blocks_{row + 1}_0_in_layers_2",
            "unet.down_blocks.1.downsamplers.0.conv": f"lora_unet_input_blocks_{2 * row}_0_op",
            "unet.up_blocks.1.attentions.0.proj_in": f"lora_unet_output_blocks_{row}_1_proj_in",
            "unet.up_blocks.1.upsamplers.0.conv": f"lora_unet_output_blocks_{2 * row - 1}_2_conv",
        }

    def test_of_a_layer_that_a_block_lacks_are_refused(self):
        to_kohya(layer("unet.up_blocks.0.resnets.2.conv1"))
        with pytest.raises(UserError, match=r"down_blocks\.0\.resnets\.2\.conv1"):
            to_kohya(layer("unet.down_blocks.0.resnets.2.conv1"))


def sgm_layers():
    """The linear layers and convolutions of Stability's SDXL UNet, from its hyperparameters."""
    width, multipliers, depths, blocks = 320, (1, 2, 4), (0, 2, 10), 2

    def resnet(place, channels_in, channels_out):
        yield from (f"{place}.{name}" for name in ("in_layers.2", "emb_layers.1", "out_layers.3"))
        if channels_in != channels_out:
            yield f"{place}.skip_connection"

    def transformer(place, depth):
        yield from (f"{place}.proj_in", f"{place}.proj_out")
        for i, attention in itertools.product(range(depth), ("attn1", "attn2")):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{place}.transformer_blocks.{i}.{attention}.{name}"
        for i, name in itertools.product(range(depth), ("net.0.proj", "net.2")):
            yield f"{place}.transformer_blocks.{i}.ff.{name}"

    yield from ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0")
    skips, channels, number = [width], width, 1
    for level, (multiplier, depth) in enumerate(zip(multipliers, depths, strict=True)):
        for _ in range(blocks):
            yield from resnet(f"input_blocks.{number}.0", channels, width * multiplier)
            channels = width * multiplier
            if depth:
                yield from transformer(f"input_blocks.{number}.1", depth)
            skips.append(channels)
            number += 1
        if level < len(multipliers) - 1:
            yield f"input_blocks.{number}.0.op"
            skips.append(channels)
            number += 1
    yield from resnet("middle_block.0", channels, channels)
    yield from transformer("middle_block.1", depths[-1])
    yield from resnet("middle_block.2", channels, channels)
    number = 0
    for level, (multiplier, depth) in reversed(list(enumerate(zip(multipliers, depths, strict=True)))):
        for block in range(blocks + 1):
            yield from resnet(f"output_blocks.{number}.0", channels + skips.pop(), width * multiplier)
            channels = width * multiplier
            if depth:
                yield from transformer(f"output_blocks.{number}.1", depth)
            if level and block == blocks:
                yield f"output_blocks.{number}.2.conv"
            number += 1
    yield "out.2"


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_file_gives_the_same_bytes(self, tmp_path, kind):
        """Keys, tensors, configurations and facts."""
        source, there, back = (tmp_path / name for name in (WEIGHTS_NAME, "k.safetensors", "b.safetensors"))
        write(source, models_with_lora(kind), {"sigma": 0.05})
        main([str(tmp_path), str(there), "--layers_per_block", "1"])
        assert all(key.startswith("lora_") for key in load_file(there))
        main([str(there), str(back), "--layers_per_block=1"])
        assert back.read_bytes() == source.read_bytes()

    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_same_tensors_and_scales_without_the_old_configuration(self, kind):
        models = models_with_lora(kind)
        tensors = with_peft_names(adapter_tensors(models))
        converted = to_kohya(tensors, configs_of(models), 1)
        back, configs = from_kohya(converted, 1)
        assert_same(back, tensors)
        again = to_kohya(back, configs, 1)
        assert_same(again, converted)
        for part in models:
            own = {k.removeprefix(f"{part}."): v for k, v in configs.items() if k.startswith(f"{part}.")}
            LoraConfig(**own)  # PEFT takes it
            assert own["use_dora"] == (kind == "dora" and part != "text_encoder_2")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_types(self, dtype):
        tensors = with_peft_names(adapter_tensors(models_with_lora("dora")))
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        converted = to_kohya(tensors, None, 1)
        assert {t.dtype for key, t in converted.items() if not key.endswith(".alpha")} == {dtype}
        assert_same(from_kohya(converted, 1)[0], tensors)

    def test_drops_a_configuration_that_no_longer_fits(self):
        models = models_with_lora("rslora")
        configs = configs_of(models)
        converted = to_kohya(adapter_tensors(models), configs, 1)
        assert from_kohya(converted, 1, configs)[1] == configs
        changed = next(key for key in converted if key.startswith("lora_unet_") and key.endswith(".alpha"))
        converted[changed] = torch.tensor(1.0)
        _, found = from_kohya(converted, 1, configs)
        assert found["unet.r"] == 4
        assert found["unet.lora_alpha"] == 16  # 8 / sqrt(4) is 16 / 4
        assert list(found["unet.alpha_pattern"].values()) == [1]
        assert found["text_encoder.r"] == configs["text_encoder.r"]
        assert found["text_encoder.target_modules"] == configs["text_encoder.target_modules"]


def configs_of(models):
    configs = {}
    for part, model in models.items():
        for key, value in model.peft_config["default"].to_dict().items():
            configs[f"{part}.{key}"] = sorted(value) if isinstance(value, set) else value
    return configs


class TestScale:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
    def test_gives_the_update_that_peft_gives(self, kind):
        models = models_with_lora(kind)
        tensors, configs = adapter_tensors(models), configs_of(models)
        count = 0
        for part, model in models.items():
            for path, module in model.named_modules():
                if not hasattr(module, "get_delta_weight"):
                    continue
                prefix = f"{part}.{path}." if part == "unet" else f"{path}."
                own = {k: t for k, t in tensors.items() if k.startswith(f"{part}.") and prefix in k}
                assert len(own) == 2
                weights = {k.partition(".")[2]: t for k, t in to_kohya(own, configs, 1).items()}
                up, down = weights["lora_up.weight"].flatten(1), weights["lora_down.weight"].flatten(1)
                update = weights["alpha"] / len(down) * up @ down
                expected = module.get_delta_weight("default")
                torch.testing.assert_close(update.reshape(expected.shape), expected)
                count += 1
        assert 2 * count == len(tensors)

    def test_is_one_without_configurations(self):
        converted = to_kohya(
            layer("unet.conv_in", rank=3, ones=(1, 1)) | layer("unet.mid_block.resnets.0.conv1")
        )
        assert converted["lora_unet_input_blocks_0_0.alpha"] == 3
        assert converted["lora_unet_middle_block_0_in_layers_2.alpha"] == 2
        assert converted["lora_unet_middle_block_0_in_layers_2.alpha"].shape == ()


class TestPipeline:
    """What diffusers draws with the files."""

    @pytest.fixture
    def draw(self):
        def draw(pipeline, path=None):
            if path is not None:
                load_adapter(pipeline, "a", path)
            image = pipeline(
                "an icon",
                height=16,
                width=16,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
            if path is not None:
                pipeline.unload_lora_weights()
            return image

        return draw

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "layers_per_block"), [("unet", 1), ("text encoders", 2), ("convolutions", 2), ("rslora", 1)]
    )
    def test_is_the_same_with_both_formats(self, tmp_path, draw, kind, layers_per_block):
        pipeline = build_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        unet = type(pipeline.unet).from_config({**pipeline.unet.config, "layers_per_block": layers_per_block})
        pipeline.unet = unet
        base = draw(pipeline)
        models = models_with_lora(kind, UNet2DConditionModel.from_config(unet.config))
        ours, theirs = tmp_path / WEIGHTS_NAME, tmp_path / "kohya.safetensors"
        write(ours, models)
        convert(ours, theirs, layers_per_block)
        expected = draw(pipeline, ours)
        assert not torch.allclose(expected, base, atol=1e-2)
        torch.testing.assert_close(draw(pipeline, theirs), expected)
        torch.testing.assert_close(draw(pipeline), base)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["patterns", "dora", "rslora"])
    def test_is_the_same_with_a_new_configuration(self, tmp_path, draw, kind):
        """As for files of other people, who leave no configuration of PEFT."""
        pipeline = build_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        models = models_with_lora(kind)
        paths = [tmp_path / f"{name}.safetensors" for name in ("ours", "kohya", "bare", "back")]
        write(paths[0], models)
        convert(paths[0], paths[1], 1)
        save_file(load_file(paths[1]), paths[2])
        convert(paths[2], paths[3], 1)
        assert (
            metadata_of(paths[3])[LORA_ADAPTER_METADATA_KEY]
            != metadata_of(paths[0])[LORA_ADAPTER_METADATA_KEY]
        )
        expected = draw(pipeline, paths[0])
        assert not torch.allclose(expected, draw(pipeline), atol=1e-2)
        torch.testing.assert_close(draw(pipeline, paths[3]), expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["convolutions", "perceptrons"])
    def test_is_the_same_with_a_foreign_file_and_what_it_becomes(self, tmp_path, draw, kind):
        pipeline = build_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        models = models_with_lora(kind)
        theirs, ours = tmp_path / "kohya.safetensors", tmp_path / WEIGHTS_NAME
        save_file(to_kohya(adapter_tensors(models), configs_of(models), 1), theirs)
        convert(theirs, ours, 1)
        expected = draw(pipeline, theirs)
        assert not torch.allclose(expected, draw(pipeline), atol=1e-2)
        torch.testing.assert_close(draw(pipeline, ours), expected)


class TestForeignFiles:
    def test_with_diffusers_names_and_other_habits_are_read(self):
        path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
        linear, shortcut = (
            f"lora_unet_{n}" for n in (path.replace(".", "_"), "input_blocks_4_0_skip_connection")
        )
        tensors = kohya_layer(linear, alpha=4.0, ones=(1, 1)) | kohya_layer(shortcut, rank=3)
        tensors |= kohya_layer("lora_te_text_model_encoder_layers_3_mlp_fc1", alpha=2.0)
        tensors |= kohya_layer("lora_te2_text_model_encoder_layers_3_mlp_fc1", alpha=0.5)
        del tensors[f"{shortcut}.alpha"]
        converted, configs = from_kohya(tensors)
        assert torch.equal(
            converted[f"unet.{path}.lora_A.weight"], tensors[f"{linear}.lora_down.weight"][:, :, 0, 0]
        )
        assert converted["unet.down_blocks.1.resnets.0.conv_shortcut.lora_A.weight"].shape == (3, 3, 1, 1)
        assert converted["unet.down_blocks.1.resnets.0.conv_shortcut.lora_B.weight"].shape == (4, 3, 1, 1)
        assert converted[
            "text_encoder.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer.down.weight"
        ].shape == (2, 3)
        assert configs["text_encoder.lora_alpha"] == 2
        assert configs["text_encoder_2.lora_alpha"] == 0.5
        assert configs["text_encoder.target_modules"] == ["encoder.layers.3.mlp.fc1"]
        ranks = {
            name: configs["unet.rank_pattern"].get(name, configs["unet.r"])
            for name in configs["unet.target_modules"]
        }
        alphas = {name: configs["unet.alpha_pattern"].get(name, configs["unet.lora_alpha"]) for name in ranks}
        assert ranks == {path: 2, "down_blocks.1.resnets.0.conv_shortcut": 3}
        assert alphas == {path: 4, "down_blocks.1.resnets.0.conv_shortcut": 3}

    def test_with_older_names_of_diffusers_are_read(self):
        attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
        new, old = layer(f"unet.{attention}.to_out.0"), {}
        for key, tensor in new.items():
            half = "down" if "lora_A" in key else "up"
            old[f"unet.{attention}.processor.to_out_lora.{half}.weight"] = tensor
        text = layer("text_encoder_2.text_model.encoder.layers.2.self_attn.v_proj")
        new |= text
        for key, tensor in text.items():
            half = "down" if "lora_A" in key else "up"
            old[f"text_encoder_2.text_model.encoder.layers.2.self_attn.to_v_lora.{half}.weight"] = tensor
        assert_same(to_kohya(old), to_kohya(new))

    def test_keep_their_dora_for_each_output(self):
        names = ("lora_unet_input_blocks_0_0", "lora_unet_middle_block_1_proj_in")
        tensors = kohya_layer(names[0], ones=(1, 1)) | kohya_layer(names[1])
        tensors[f"{names[0]}.dora_scale"] = torch.rand(4, 1, 1, 1)
        tensors[f"{names[1]}.dora_scale"] = torch.rand(4, 1)
        converted, configs = from_kohya(tensors)
        assert converted["unet.conv_in.lora_magnitude_vector"].shape == (1, 4, 1, 1)
        assert converted["unet.mid_block.attentions.0.proj_in.lora_magnitude_vector"].shape == (4,)
        assert configs["unet.use_dora"] is True
        assert_same(to_kohya(converted, configs), tensors)


def test_metadata_are_those_that_readers_expect(tmp_path):
    source, target = tmp_path / WEIGHTS_NAME, tmp_path / "kohya.safetensors"
    write(source, models_with_lora("unet"), {"sigma": 0.05})
    convert(source, target, 1)
    metadata = metadata_of(target)
    assert metadata.pop("flat_lora") == metadata_of(source)["flat_lora"]
    assert json.loads(metadata.pop(PEFT_METADATA_KEY))["unet.lora_alpha"] == 8
    assert metadata == {
        "format": "pt",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_alpha": "8.0",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
    }
    write(source, models_with_lora("patterns"))
    convert(source, target, 1)
    assert metadata_of(target)["ss_network_dim"] == metadata_of(target)["ss_network_alpha"] == "Dynamic"


def test_files_are_the_same_each_time(tmp_path):
    source, target = tmp_path / WEIGHTS_NAME, tmp_path / "kohya.safetensors"
    write(source, models_with_lora("text encoders"), {"a": 1, "b": 2})
    contents = set()
    for _ in range(3):
        convert(source, target, 1)
        contents.add(target.read_bytes())
    assert len(contents) == 1
    content = contents.pop()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    keys = list(header["__metadata__"])
    assert len(keys) > 5
    assert keys == sorted(keys)


def test_dora_is_warned_of(tmp_path, caplog):
    source, target = tmp_path / WEIGHTS_NAME, tmp_path / "kohya.safetensors"
    for kind, warned in (("unet", False), ("dora", True)):
        write(source, models_with_lora(kind))
        with caplog.at_level(logging.WARNING, logger="flatlora_diffusion.adapter.kohya"):
            convert(source, target, 1)
        assert ("DoRA" in caplog.text) == warned


Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
IN = "lora_unet_input_blocks_0_0"
OUT = "unet.conv_out"


def without(tensors, ending):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}


BAD = {
    "LoHa": (
        kohya_layer(Q) | {f"{IN}.hada_w1_a": torch.ones(2), f"{IN}.hada_w1_b": torch.ones(2)},
        r"hada_w1_a.* 2 ",
    ),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.alpha": torch.tensor(1.0)}, "lokr_w1.* 1 "),
    "unknown block": (kohya_layer("lora_unet_input_blocks_3_1_proj_in"), "input_blocks_3_1_proj_in.* 3 "),
    "unknown layer": (kohya_layer("lora_unet_input_blocks_4_1_norm"), "input_blocks_4_1_norm"),
    "another encoder": (kohya_layer("lora_te3_text_model_encoder_layers_0_mlp_fc1"), "lora_te3"),
    "unknown layer of ours": (layer("unet.mid_block.norm"), r"unet\.mid_block\.norm"),
    "bias": (layer(OUT, ones=(1, 1)) | {f"{OUT}.lora_B.bias": torch.ones(4)}, r"lora_B\.bias"),
    "both formats": (kohya_layer(Q) | layer(OUT), OUT),
    "a whole model": ({"conv_in.weight": torch.ones(2, 2)}, r"conv_in\.weight"),
    "nothing": ({}, "no LoRA weight"),
    "no up": (without(kohya_layer(Q), "lora_up.weight"), "attn1.to_q: lacks"),
    "no down of ours": (without(layer(OUT), "lora_A.weight"), "conv_out: lacks"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, "attn1.to_q: lacks"),
    "ranks": (kohya_layer(Q) | {f"{Q}.lora_up.weight": torch.ones(4, 3)}, r"\[2, 3\] and \[4, 3\]"),
    "1-D": (kohya_layer(Q) | {f"{Q}.lora_down.weight": torch.ones(2)}, r"\[2\]"),
    "a wide kernel up": (
        kohya_layer(IN) | {f"{IN}.lora_up.weight": torch.ones(4, 2, 3, 3)},
        r"\[4, 2, 3, 3\]",
    ),
    "a wide linear layer": (
        kohya_layer(Q) | {f"{Q}.lora_down.weight": torch.ones(2, 3, 3, 3)},
        "linear layer",
    ),
    "alpha 0": (kohya_layer(Q, alpha=0.0), "alpha"),
    "alpha NaN": (kohya_layer(Q, alpha=float("nan")), "alpha"),
    "two alphas": (kohya_layer(Q, alpha=[1.0, 2.0]), "alpha"),
    "twice": (kohya_layer(IN) | kohya_layer("lora_unet_conv_in"), "lora_unet_input_blocks_0_0.*another name"),
    # As many inputs as outputs, so that only the axis tells.
    "DoRA of inputs": (kohya_layer(Q) | {f"{Q}.dora_scale": torch.ones(1, 4)}, "scales the inputs"),
    "DoRA of ours": (layer(OUT) | {f"{OUT}.lora_magnitude_vector": torch.ones(7)}, r"DoRA of shape \[7\]"),
}
BAD_METADATA = {
    "not JSON": ("{", "JSON"),
    "not an object": ("[1]", "JSON"),
    "another rank": (json.dumps({"unet.r": 5, "unet.lora_alpha": 5}), "rank 2, in the metadata 5"),
    "no number": (json.dumps({"unet.r": 2, "unet.lora_alpha": "much"}), "much"),
    "a list of patterns": (json.dumps({"unet.r": 2, "unet.rank_pattern": 3}), "aren't PEFT's"),
    "a broken pattern": (json.dumps({"unet.r": 2, "unet.alpha_pattern": {"(": 3}}), "aren't PEFT's"),
}


class TestBadInput:
    """Exit code 2, one line that names the culprit, and nothing written."""

    @pytest.fixture
    def refused(self, tmp_path, capfd):
        def refused(*arguments):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(SystemExit) as stop:
                run_command(lambda: main([str(argument) for argument in arguments]))
            lines = capfd.readouterr().err.splitlines()
            assert stop.value.code == 2
            assert len(lines) == 1, lines
            assert lines[0].startswith("error: ")
            assert sorted(tmp_path.rglob("*")) == before
            return lines[0]

        return refused

    @pytest.mark.parametrize("case", BAD)
    def test_tensors(self, tmp_path, refused, case):
        tensors, message = BAD[case]
        source = tmp_path / "source.safetensors"
        save_file(tensors, source)
        line = refused(source, tmp_path / "target.safetensors")
        assert str(source) in line
        assert re.search(message, line)

    @pytest.mark.parametrize("case", BAD_METADATA)
    def test_metadata(self, tmp_path, refused, case):
        text, message = BAD_METADATA[case]
        source = tmp_path / "source.safetensors"
        save_file(layer(OUT), source, metadata={LORA_ADAPTER_METADATA_KEY: text})
        line = refused(source, tmp_path / "target.safetensors")
        assert str(source) in line
        assert message in line

    def test_metadata_of_kohyas_files(self, tmp_path, refused):
        source = tmp_path / "source.safetensors"
        for text, message in (("{", "JSON"), (json.dumps({"unet.r": "two"}), "two")):
            save_file(kohya_layer(Q), source, metadata={PEFT_METADATA_KEY: text})
            assert message in refused(source, tmp_path / "target.safetensors")

    def test_paths(self, tmp_path, refused):
        source, there = tmp_path / "source.safetensors", tmp_path / "there.safetensors"
        target = tmp_path / "target.safetensors"
        save_file(layer(OUT), source)
        there.write_bytes(b"precious")
        pickled, damaged = tmp_path / "lora.pt", tmp_path / "damaged.safetensors"
        torch.save(layer(OUT), pickled)
        torch.save(layer(OUT), damaged)
        (tmp_path / "run").mkdir()
        assert "there.safetensors: exists" in refused(source, there)
        assert there.read_bytes() == b"precious"
        assert "lora.pt: must be a .safetensors file" in refused(pickled, target)
        assert "damaged.safetensors: not a sound safetensors file" in refused(damaged, target)
        assert "target.pt: must be a .safetensors file" in refused(source, tmp_path / "target.pt")
        assert "absent.safetensors" in refused(tmp_path / "absent.safetensors", target)
        assert WEIGHTS_NAME in refused(tmp_path / "run", target)
        assert "absent/x.safetensors: its folder" in refused(source, tmp_path / "absent" / "x.safetensors")
        assert "--layers_per_block 0" in refused(source, target, "--layers_per_block", "0")
        assert "--layers_per_block" in refused(source, target, "--layers_per_block", "two")
        assert "--layer_per_block" in refused(source, target, "--layer_per_block", "2")
        assert "TARGET" in refused(source)

    def test_of_a_process_has_no_traceback(self, launcher, tmp_path):
        source = tmp_path / "source.safetensors"
        save_file(BAD["LoHa"][0], source)
        done = launcher.run("-m", "flatlora_diffusion.kohya", source, tmp_path / "target.safetensors")
        assert done.code == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: {source}: {IN}.hada_w1_a")
        assert list(tmp_path.iterdir()) == [source]
