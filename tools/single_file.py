"""Write a pipeline of SDXL as one file with the original repository's names, as ComfyUI and A1111 load it.

python tools/single_file.py assets/micro-sdxl demo.safetensors

Its configurations and tokenizers go into a folder beside the file, called like it without .safetensors. Only
pipelines of another architecture than SDXL's, as the demo base, need it.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
}


def original(pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline in the names of the original repository."""
    tensors = {}
    parts = {
        "model.diffusion_model.": unet_tensors(pipeline.unet.state_dict(), pipeline.unet.config),
        "first_stage_model.": vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.config.up_block_types)),
        "conditioner.embedders.0.transformer.text_model.": _flat(pipeline.text_encoder.state_dict()),
        "conditioner.embedders.1.model.": open_clip_tensors(pipeline.text_encoder_2.state_dict()),
    }
    for prefix, own in parts.items():
        tensors |= {prefix + key: tensor.contiguous() for key, tensor in own.items()}
    return tensors


def unet_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """Those of the UNet, by the names of input_blocks, middle_block and output_blocks."""
    blocks = config["layers_per_block"] + 1

    def place(match: re.Match[str]) -> str:
        side, block, kind, index = match["side"], int(match["block"]), match["kind"], int(match["index"])
        number = block * blocks + index + (side == "down")
        if kind == "resnets":
            inside = 0
        elif kind == "attentions":
            inside = 1
        else:
            number = block * blocks + blocks - (side == "up")
            attends = config[f"{side}_block_types"][block].startswith("CrossAttn")
            inside = 1 + attends if side == "up" else 0
        name = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inside}"
        return f"{name}.op" if kind == "downsamplers" else name

    found = {}
    for key, tensor in tensors.items():
        pattern = r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>\w+)\.(?P<index>\d+)"
        name = re.sub(pattern, place, key, count=1)
        if "downsamplers" in key:
            name = name.replace(".op.conv", ".op")
        if ".resnets." in key:
            name = _replaced(name, _RESNET)
        found[_replaced(name, _UNET)] = tensor
    return found


def vae_tensors(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Those of the VAE; its attention's linear layers are convolutions there."""
    found = {}
    for key, tensor in tensors.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", key)
        name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
        name = re.sub(r"mid_block\.block\.", "mid_block.resnets.", name)
        linear = "attentions" in key and tensor.ndim == 2
        found[_replaced(name, _VAE)] = tensor[:, :, None, None] if linear else tensor
    return found


def open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the second text encoder, whose projections of query, key and value are one there."""
    found = {}
    for key, tensor in _flat(tensors).items():
        name = key
        for own, theirs in _OPEN_CLIP.items():
            name = name.replace(own, theirs)
        if "q_proj" in key:
            all_three = [_flat(tensors)[key.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat(all_three)
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif "k_proj" not in key and "v_proj" not in key:
            found[name] = tensor
    return found


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


def _replaced(name: str, names: Mapping[str, str]) -> str:
    """The name with each of its parts that has another name."""
    for own, theirs in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(own)}(?![^.])", theirs, name)
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path, help="folder in the diffusers format")
    parser.add_argument("file", type=Path, help="the .safetensors file to write")
    given = parser.parse_args(arguments)
    pipeline = StableDiffusionXLPipeline.from_pretrained(given.pipeline, use_safetensors=True)
    save_file(original(pipeline), given.file, metadata={"format": "pt"})
    beside = given.file.with_suffix("")
    if beside.resolve() != given.pipeline.resolve():
        weights = shutil.ignore_patterns("*.safetensors", "*.png", "README.md")
        shutil.copytree(given.pipeline, beside, ignore=weights, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
