"""The layers of an adapter file in any format that is read: complete, finite, each with its scale."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.configs import check_config, config_of, fits, part_config, scale_and_alpha
from flatlora_diffusion.adapter.file import loadable_name
from flatlora_diffusion.adapter.formats import SDXL_WIDTHS, describe_unknown, read_adapter
from flatlora_diffusion.adapter.kohya_names import (
    CONVOLUTION,
    PREFIXES,
    Layer,
    layer_names,
    parse_kohya_key,
    split_diffusers_key,
)
from flatlora_diffusion.common.errors import UserError

_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of an adapter file, sound in themselves.

    Attributes:
        weights: Of each layer down, up and, where the file has them, magnitude and alpha, in PEFT's shapes.
        scales: Of each layer the factor on B @ A.
        alphas: Those that the file states.
        format: `diffusers`, `kohya` or `peft`.
        as_diffusers: Whether diffusers reads the file itself as it is meant.
    """

    weights: dict[Layer, dict[str, Tensor]]
    scales: dict[Layer, float]
    alphas: dict[Layer, float]
    format: str
    as_diffusers: bool

    def to_diffusers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors in the diffusers format, and PEFT's configurations."""
        return to_diffusers(
            {
                layer: own | {"alpha": torch.tensor(self.scales[layer] * len(own["down"]))}
                for layer, own in self.weights.items()
            }
        )


def is_convolution_by_name(layer: Layer) -> bool:
    """Whether a layer of SDXL is a convolution, where no model is at hand to ask."""
    return CONVOLUTION.fullmatch(layer[1]) is not None


def read_layers(
    file: Path,
    layers_per_block: int,
    widths: Mapping[str, int] = SDXL_WIDTHS,
    *,
    is_convolution: Callable[[Layer], bool] = is_convolution_by_name,
    stored_magnitudes: bool = False,
) -> AdapterLayers:
    """Read the layers of an adapter file.

    Args:
        file: In the diffusers format, kohya's or PEFT's.
        layers_per_block: Of the UNet; SDXL has 2. It decides the numbers in kohya's names.
        widths: Features of `text_encoder` and `text_encoder_2`, which tell whose a file of PEFT is.
        is_convolution: Whether a layer is one.
        stored_magnitudes: DoRA's magnitudes keep their shape, which in kohya's files may be that of inputs.

    Raises:
        UserError: Names the file and what is wrong in it.
    """
    adapter = read_adapter(file, widths)
    tensors, configs, of_kohya = adapter.tensors, adapter.configs, adapter.format == "kohya"
    _require_finite(file, tensors)
    parse = split_diffusers_key
    if of_kohya:
        parse = functools.partial(parse_kohya_key, layer_names(layers_per_block))
    try:
        found = complete_layers(tensors, parse)
        layers = {
            layer: shaped(own, layer, is_convolution(layer), of_kohya=of_kohya and not stored_magnitudes)
            for layer, own in found.items()
        }
        for part in PREFIXES:
            check_config(part, part_config(configs, part))
        scales, alphas = {}, {}
        for layer, own in layers.items():
            scales[layer], alpha = scale_and_alpha(layer, own, part_config(configs, layer[0]))
            if alpha is not None:
                alphas[layer] = alpha
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    same = all(loadable_name(key) == key for key in tensors) and all(
        own[kind].shape == found[layer][kind].shape for layer, own in layers.items() for kind in own
    )
    return AdapterLayers(layers, scales, alphas, adapter.format, adapter.format == "diffusers" and same)


def _require_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors of a file with values that aren't finite numbers.

    Raises:
        UserError: Names the file and the first of them.
    """
    for key in sorted(tensors):
        tensor = tensors[key]
        # sd-scripts writes an alpha as a whole number.
        number = tensor.is_floating_point() or (key.endswith(".alpha") and tensor.dtype in _WHOLE)
        if not (number and tensor.float().isfinite().all()):
            raise UserError(f"{file}: {key} has values that aren't finite numbers; get a sound file")


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
        own["magnitude"] = reshaped(weights["magnitude"], 0, shape, layer)
    return own


def _as_module(weight: Tensor, layer: Layer, convolution: bool) -> Tensor:
    """The weight with as many dimensions as in PEFT: 4 for convolutions, else 2."""
    if convolution:
        return weight[:, :, None, None] if weight.ndim == 2 else weight
    if weight.shape[2:].numel() != 1:
        raise UserError(f"{'.'.join(layer)}: a linear layer can't have the shape {list(weight.shape)}")
    return weight.flatten(1)


def reshaped(magnitude: Tensor, axis: int, shape: Sequence[int], layer: Layer) -> Tensor:
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


def to_diffusers(
    layers: dict[Layer, dict[str, Tensor]], lora_metadata: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in the diffusers format, and PEFT's configurations.

    Args:
        layers: The weights of each (down, up, magnitude, alpha), in PEFT's shapes; alpha is the rank where
            there is none.
        lora_metadata: Configurations to keep if they give every layer this rank and scale.

    Raises:
        UserError: An alpha isn't one number other than 0.
    """
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
        if config is None or not fits(config, own, dora):
            config = config_of(own, dora)
        configs |= {f"{part}.{key}": value for key, value in config.items()}
    return converted, configs
