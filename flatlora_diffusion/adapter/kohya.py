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
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save
from torch import Tensor

from flatlora_diffusion.adapter.file import loadable_name, with_sorted_metadata
from flatlora_diffusion.adapter.formats import describe_unknown, read_adapter, read_configs
from flatlora_diffusion.adapter.kohya_names import (
    CONVOLUTION,
    PREFIXES,
    Layer,
    kohya_names,
    layer_names,
    parse_diffusers_key,
    parse_kohya_key,
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
            converted[f"{name}.dora_scale"] = _reshaped(weights["magnitude"], len(shape) // 4, shape, layer)
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
        layers[layer] = shaped(weights, layer, bool(CONVOLUTION.fullmatch(layer[1])), of_kohya=True)
    return to_diffusers(layers, lora_metadata)


def to_diffusers(
    layers: dict[Layer, dict[str, Tensor]], lora_metadata: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same from the weights of each layer (down, up, magnitude, alpha), in PEFT's shapes."""
    # By these names diffusers finds every layer; in the UNet it passes over `lora.down` beside `lora_A`.
    halves = dict.fromkeys(PREFIXES, ("lora_linear_layer.down", "lora_linear_layer.up"))
    attention = all(re.search(r"\.to_([qkv]|out\.0)$", path) for part, path in layers if part == "unet")
    halves |= {"unet": ("lora.down", "lora.up") if attention else ("lora_A", "lora_B")}
    converted, configs = {}, {}
    scales: dict[str, dict[str, tuple[int, float]]] = {}
    for layer, weights in layers.items():
        part, path = layer
        down, up = weights["down"], weights["up"]
        alpha = weights.get("alpha", torch.tensor(len(down)))
        # For 0, sd-scripts takes the rank and ComfyUI takes 0: whoever made the file must say.
        if alpha.numel() != 1 or not math.isfinite(alpha) or not alpha:
            raise UserError(f"{part}.{path}: alpha must be one number other than 0; mend the file")
        scales.setdefault(part, {})[path] = len(down), alpha.item()
        for half, weight in zip(halves[part], (down, up), strict=True):
            converted[f"{part}.{path}.{half}.weight"] = weight
        if "magnitude" in weights:
            converted[loadable_name(f"{part}.{path}.lora_magnitude_vector")] = weights["magnitude"]
    for part, own in scales.items():
        dora = any("magnitude" in weights for layer, weights in layers.items() if layer[0] == part)
        config = part_config(lora_metadata, part)
        if config is None or not _fits(config, own, dora):
            config = _config(own, dora)
        configs |= {f"{part}.{key}": value for key, value in config.items()}
    return converted, configs


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


def complete_layers(
    tensors: dict[str, Tensor], parse: Callable[[str], tuple[Layer, str] | None]
) -> dict[Layer, dict[str, Tensor]]:
    """The weights of each layer, complete, from all keys of a file.

    Args:
        tensors: All that the file holds.
        parse: A key -> its layer and down, up, magnitude or alpha; None for other keys.

    Raises:
        UserError: A key is no LoRA weight, a layer lacks one of its two, or they don't fit each other.
    """
    layers: dict[Layer, dict[str, Tensor]] = {}
    unknown = []
    for key in sorted(tensors):
        if not (parsed := parse(key)):
            unknown.append(key)
            continue
        layer, kind = parsed
        if kind in layers.setdefault(layer, {}):
            raise UserError(f"{key}: this weight is there under another name too; remove one of them")
        layers[layer][kind] = tensors[key]
    if unknown or not layers:
        raise UserError(describe_unknown(unknown) if unknown else "there is no LoRA weight of SDXL in it")
    for layer, weights in layers.items():
        down, up = weights.get("down"), weights.get("up")
        if down is None or up is None:
            missing = "down weight (lora_A)" if down is None else "up weight (lora_B)"
            raise UserError(f"{'.'.join(layer)}: lacks its {missing}; get the whole file")
        if not {down.ndim, up.ndim} <= {2, 4} or len(down) != up.shape[1] or up.shape[2:].numel() != 1:
            raise UserError(
                f"{'.'.join(layer)}: {list(down.shape)} and {list(up.shape)} aren't LoRA's shapes"
            )
    return layers


def shaped(
    weights: dict[str, Tensor], layer: Layer, convolution: bool, *, of_kohya: bool
) -> dict[str, Tensor]:
    """A layer's weights in PEFT's shapes, values unchanged.

    Args:
        weights: Down, up, magnitude and alpha; those of linear layers may be convolutions of 1 x 1.
        layer: Whose they are, for errors.
        convolution: Whether the layer is one.
        of_kohya: The magnitudes are shaped as kohya's: with the outputs on the first axis.

    Raises:
        UserError: They have no such shapes.
    """
    own = dict(weights)
    for kind in ("down", "up"):
        own[kind] = _as_module(weights[kind], layer, convolution)
    if of_kohya and "magnitude" in weights:
        outputs = len(own["up"])
        shape = (1, outputs, 1, 1) if convolution else (outputs,)
        own["magnitude"] = _reshaped(weights["magnitude"], 0, shape, layer)
    return own


def _as_module(weight: Tensor, layer: Layer, convolution: bool) -> Tensor:
    """The weight with as many dimensions as in PEFT: 4 for convolutions, else 2."""
    if convolution:
        return weight[:, :, None, None] if weight.ndim == 2 else weight
    if weight.shape[2:].numel() != 1:
        raise UserError(f"{'.'.join(layer)}: a linear layer can't have the shape {list(weight.shape)}")
    return weight.flatten(1)


def _reshaped(magnitude: Tensor, axis: int, shape: Sequence[int], layer: Layer) -> Tensor:
    """DoRA's magnitudes, with the outputs on an axis, in another shape."""
    outputs = math.prod(shape)
    if axis == 0 and magnitude.ndim > 1 and magnitude.shape[0] == 1 < outputs:
        raise UserError(
            f"{'.'.join(layer)}: its DoRA scales the inputs (LyCORIS's wd_on_out=False), which PEFT can't; "
            "write the nearest plain LoRA: flatlora-kohya SOURCE TARGET --rank N --base BASE"
        )
    if magnitude.numel() != outputs or magnitude.shape[axis : axis + 1] != (outputs,):
        raise UserError(
            f"{'.'.join(layer)}: DoRA of shape {list(magnitude.shape)} isn't one value for an output"
        )
    return magnitude.reshape(shape)


def part_config(lora_metadata: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
    """PEFT's configuration of one part, from the metadata of all; None where they say nothing of it."""
    own = {k.partition(".")[2]: v for k, v in (lora_metadata or {}).items() if k.startswith(f"{part}.")}
    return own or None


def rank_and_alpha(config: dict[str, Any] | None, path: str, rank: int) -> tuple[int, float]:
    """A layer's rank, and the alpha for which its scale is alpha / rank.

    Args:
        config: From `part_config`.
        path: Of the layer in the model.
        rank: Of its tensors, for files without a configuration: alpha is then the rank.

    Raises:
        UserError: The configuration isn't one of PEFT's.
    """
    if config is None:
        return rank, rank
    names = (path, path.removeprefix("text_model."))  # with older and newer transformers

    def setting(default: Any, patterns: dict[str, Any] | None) -> Any:
        known = patterns or {}
        for pattern in known:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):  # as PEFT does
                return known[pattern]
        return default

    try:
        rank = int(setting(config.get("r", 8), config.get("rank_pattern")))  # 8: PEFT's defaults
        alpha = float(setting(config.get("lora_alpha", 8), config.get("alpha_pattern")))
        # rsLoRA scales by alpha / sqrt(rank).
        return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"the adapter's metadata aren't PEFT's ({error}); export it again") from error


def _fits(config: dict[str, Any], scales: dict[str, tuple[int, float]], dora: bool) -> bool:
    """Whether a configuration gives every layer this rank and alpha."""
    expected = {path: rank_and_alpha(config, path, rank) for path, (rank, _) in scales.items()}
    return bool(config.get("use_dora")) == dora and all(
        rank == expected[path][0] and math.isclose(alpha, expected[path][1], rel_tol=1e-6)
        for path, (rank, alpha) in scales.items()
    )


def _config(scales: dict[str, tuple[int, float]], dora: bool) -> dict[str, Any]:
    """PEFT's configuration for layers with these ranks and alphas."""
    # Without this level the names fit the models of older and newer transformers.
    scales = {path.removeprefix("text_model."): scale for path, scale in sorted(scales.items())}
    ranks = {path: rank for path, (rank, _) in scales.items()}
    alphas = {path: int(alpha) if alpha == int(alpha) else alpha for path, (_, alpha) in scales.items()}
    rank, alpha = (statistics.mode(sorted(values.values())) for values in (ranks, alphas))
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(scales), "use_dora": dora}
    config["rank_pattern"] = {path: own for path, own in ranks.items() if own != rank}
    config["alpha_pattern"] = {path: own for path, own in alphas.items() if own != alpha}
    return config


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
