"""Names of SDXL's layers in LoRA files: diffusers', with PEFT's suffixes and older ones, and kohya's.

kohya names the UNet's layers as Stability's code does, with underscores for dots.
"""

from __future__ import annotations

import functools
import re

# unet, text_encoder or text_encoder_2; diffusers' path of the module in it
Layer = tuple[str, str]

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_WEIGHTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
_DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(.+?)"
    r"(?:\.lora_([AB])\.weight|[._]lora(?:_linear_layer)?\.(down|up)\.weight|\.lora_magnitude_vector(?:\.weight)?)"
)
CONVOLUTION = re.compile(r"(.*\.)?(conv|conv1|conv2|conv_in|conv_out|conv_shortcut)")

# More blocks on a side, transformer blocks in a row and text layers than SDXL or its kin have: names are
# looked up among all that can be, since underscores for dots can't be undone.
_BLOCKS, _DEPTH, _TEXT_LAYERS = 8, 32, 64
_TRANSFORMER = [f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")]
_TRANSFORMER += ["ff.net.0.proj", "ff.net.2"]
_CLIP = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
_TEXT = [f"text_model.encoder.layers.{i}.{leaf}" for i in range(_TEXT_LAYERS) for leaf in _CLIP]
_TEXT.append("text_projection")
# diffusers' names -> Stability's: layers of the UNet outside its blocks, and those of each kind inside.
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INNER = {
    "attentions": {"proj_in": "proj_in", "proj_out": "proj_out"}
    | {
        f"transformer_blocks.{i}.{leaf}": f"transformer_blocks.{i}.{leaf}"
        for i in range(_DEPTH)
        for leaf in _TRANSFORMER
    },
    "resnets": {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}


@functools.cache
def kohya_names(layers_per_block: int) -> dict[Layer, str]:
    """Every layer that a LoRA can be on, and its name in kohya's format."""
    # Stability numbers the blocks of a side in one row.
    row = layers_per_block + 1
    places = {"mid_block.attentions.0": "middle_block.1"}
    places |= {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(2)}
    for i in range(_BLOCKS):
        for slot, kind in enumerate(("resnets", "attentions")):
            for j in range(layers_per_block):  # after conv_in, input 0
                places[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{row * i + j + 1}.{slot}"
            for j in range(row):
                places[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{row * i + j}.{slot}"
        places[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{row * (i + 1)}.0"
        # Slot 2, after the attention: SDXL has one wherever it upsamples.
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{row * i + layers_per_block}.2"
    unet = dict(_OUTER)
    for place, stability in places.items():
        unet |= {f"{place}.{k}": f"{stability}.{v}" for k, v in _INNER[place.split(".")[-2]].items()}
    parts = {"unet": unet} | {part: {path: path for path in _TEXT} for part in PREFIXES if part != "unet"}
    return {
        (part, path): f"{PREFIXES[part]}_{name}".replace(".", "_")
        for part, names in parts.items()
        for path, name in names.items()
    }


@functools.cache
def layer_names(layers_per_block: int) -> dict[str, Layer]:
    """Every name in kohya's format, also with diffusers' names and SD 1's prefix, and its layer."""
    names = {name: layer for layer, name in kohya_names(layers_per_block).items()}
    for part, path in kohya_names(layers_per_block):
        names[f"{PREFIXES[part]}_{path}".replace(".", "_")] = part, path
        if part == "text_encoder":
            names[f"lora_te_{path}".replace(".", "_")] = part, path
    return names


def parse_diffusers_key(names: dict[Layer, str], key: str) -> tuple[Layer, str] | None:
    """The layer and down, up or magnitude; None for other keys."""
    parsed = split_diffusers_key(key)
    return parsed if parsed and parsed[0] in names else None


def split_diffusers_key(key: str) -> tuple[Layer, str] | None:
    """The same whether a model has such a layer or not."""
    if not (match := _DIFFUSERS_KEY.fullmatch(key)):
        return None
    part, path, letter, old = match.groups()
    path = path.replace(".processor.", ".")  # of diffusers before it used PEFT
    if part == "unet":
        path = re.sub(r"\.to_out$", ".to_out.0", path)
    else:
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)
        path = re.sub(r"^encoder\.", "text_model.encoder.", path)  # newer transformers dropped this level
    kind = {"A": "down", "B": "up"}.get(letter, old or "magnitude")
    return (part, path), kind


def parse_kohya_key(names: dict[str, Layer], key: str) -> tuple[Layer, str] | None:
    """The layer and down, up, magnitude or alpha; None for other keys."""
    name, _, weight = key.partition(".")
    return (names[name], _WEIGHTS[weight]) if name in names and weight in _WEIGHTS else None
