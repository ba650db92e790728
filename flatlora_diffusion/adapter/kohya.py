"""LoRA files between the diffusers format and kohya's, which ComfyUI, A1111 and sd-scripts read.

From a shell, in the direction that the names in SOURCE ask for:

    python -m flatlora_diffusion.kohya pytorch_lora_weights.safetensors icons_kohya.safetensors

kohya's format names the UNet's layers as Stability's code does, with underscores for dots, and each layer has
a scalar `alpha`: the update is (alpha / rank) up @ down. DoRA's magnitudes become `dora_scale`.

Not every reader does the same with such a file. Where layers have different alphas, diffusers takes the most
frequent one of a model for all of them. Of DoRA, diffusers leaves `dora_scale` out, ComfyUI divides by norms
of the base's weights without the update, and A1111 by norms over the outputs. `from_kohya` does as PEFT does.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save
from torch import Tensor

from flatlora_diffusion.adapter.configs import part_config, rank_and_alpha
from flatlora_diffusion.adapter.file import with_sorted_metadata
from flatlora_diffusion.adapter.formats import read_adapter, read_configs
from flatlora_diffusion.adapter.kohya_names import (
    kohya_names,
    layer_names,
    parse_diffusers_key,
    parse_kohya_key,
)
from flatlora_diffusion.adapter.layers import (
    complete_layers,
    is_convolution_by_name,
    reshaped,
    shaped,
    to_diffusers,
)
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically

logger = logging.getLogger(__name__)

# Not diffusers' own key: its loader refuses a file that has both that and alphas.
PEFT_METADATA_KEY = "flat_lora_peft"


def to_kohya(
    tensors: dict[str, Tensor], lora_metadata: dict[str, Any] | None = None, layers_per_block: int = 2
) -> dict[str, Tensor]:
    """An adapter in kohya's format.

    Args:
        tensors: In the diffusers format, with PEFT's names or older ones: for each layer A (rank, in) and B
            (out, rank), for convolutions (rank, in, height, width) and (out, rank, 1, 1), and for DoRA the
            magnitudes, (out,) or (1, out, 1, 1).
        lora_metadata: PEFT's configurations, as `unet.lora_alpha`; without them alpha is the rank.
        layers_per_block: Of the UNet; SDXL has 2. It decides the numbers of Stability's blocks.

    Returns:
        The same values under kohya's names, with a float32 scalar alpha for each layer, and magnitudes of the
        shape (out, 1) or (out, 1, 1, 1).

    Raises:
        UserError: A key is no LoRA weight of SDXL, a layer is incomplete, or the metadata don't fit.
    """
    names = kohya_names(layers_per_block)
    converted = {}
    for layer, weights in complete_layers(tensors, functools.partial(parse_diffusers_key, names)).items():
        name, down, up = names[layer], weights["down"], weights["up"]
        rank, alpha = rank_and_alpha(part_config(lora_metadata, layer[0]), layer[1], len(down))
        if rank != len(down):
            raise UserError(f"{'.'.join(layer)}: rank {len(down)}, in the metadata {rank}; export it again")
        converted[f"{name}.lora_down.weight"] = down
        converted[f"{name}.lora_up.weight"] = up
        converted[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if "magnitude" in weights:
            shape = (len(up), *[1] * (down.ndim - 1))
            converted[f"{name}.dora_scale"] = reshaped(weights["magnitude"], len(shape) // 4, shape, layer)
    return converted


def from_kohya(
    tensors: dict[str, Tensor], layers_per_block: int = 2, lora_metadata: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter in the diffusers format, and PEFT's configurations.

    Args:
        tensors: In kohya's format; the UNet's layers may have Stability's names or diffusers'. Linear layers
            may be stored as convolutions of 1 x 1. The alpha of a layer without one is its rank.
        layers_per_block: Of the UNet; SDXL has 2.
        lora_metadata: Configurations that the file was made from. They are returned as they are if they give
            every layer the rank and the scale that the file gives it.

    Returns:
        What `to_kohya` takes: the tensors, with values and types unchanged, under the names that this project
        exports, and configurations. Those made here name every layer; ranks and alphas that aren't the most
        frequent ones are in `rank_pattern` and `alpha_pattern`.

    Raises:
        UserError: A key is no LoRA weight of SDXL, a layer is incomplete, or a value can't be converted.
    """
    layers = complete_layers(tensors, functools.partial(parse_kohya_key, layer_names(layers_per_block)))
    for layer, weights in layers.items():
        layers[layer] = shaped(weights, layer, is_convolution_by_name(layer), of_kohya=True)
    return to_diffusers(layers, lora_metadata)


def convert(source: Path, target: Path, layers_per_block: int = 2) -> None:
    """Write the adapter of a safetensors file in the other format; the same bytes each time, or nothing.

    Args:
        source: In either format.
        target: Overwritten where it exists.
        layers_per_block: Of the UNet; SDXL has 2.

    Raises:
        UserError: The source is missing, damaged or can't be converted; the target can't be written.
    """
    adapter = read_adapter(source)
    metadata = {"format": "pt"} | adapter.metadata
    try:
        if adapter.format == "kohya":
            stored = read_configs(metadata.pop(PEFT_METADATA_KEY, None))
            converted, configs = from_kohya(adapter.tensors, layers_per_block, stored)
            metadata = {key: value for key, value in metadata.items() if key not in kohya_metadata({})}
            metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(configs, indent=2, sort_keys=True)
        else:
            metadata.pop(LORA_ADAPTER_METADATA_KEY, None)
            converted = to_kohya(adapter.tensors, adapter.configs, layers_per_block)
            metadata |= kohya_metadata(converted)
            if adapter.configs is not None:
                metadata[PEFT_METADATA_KEY] = json.dumps(adapter.configs, indent=2, sort_keys=True)
            if any(key.endswith(".dora_scale") for key in converted):
                logger.warning(
                    "%s: ComfyUI, A1111, sd-scripts and diffusers each read its DoRA otherwise, so none "
                    "draws what was trained; for them write the nearest plain LoRA: flatlora-kohya %s "
                    "NEW.safetensors --rank N --base BASE",
                    target,
                    source,
                )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    converted = {key: tensor.contiguous() for key, tensor in converted.items()}
    write_atomically(target, with_sorted_metadata(save(converted, metadata=metadata)))


def kohya_metadata(tensors: dict[str, Tensor]) -> dict[str, str]:
    """What readers look for in kohya's files; as in sd-scripts, Dynamic where layers differ."""
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_down.weight")}
    alphas = {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
