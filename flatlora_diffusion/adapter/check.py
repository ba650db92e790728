"""An adapter file, checked before anything of it enters a pipeline, and compared with what entered."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.adapter.file import find_file, read_facts
from flatlora_diffusion.adapter.kohya_names import PREFIXES, Layer
from flatlora_diffusion.adapter.layers import AdapterLayers, is_convolution_by_name, read_layers
from flatlora_diffusion.adapter.strength import file_digest
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.weights import weight_of

# How many features of a prompt the UNet's cross-attention takes.
_PROMPT_FEATURES = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}


def check_adapter(pipeline: StableDiffusionXLPipeline, path: Path) -> AdapterFacts:
    """Refuse an adapter that isn't sound or doesn't fit a base. The pipeline is left as it is.

    Args:
        pipeline: The base, with or without other adapters.
        path: A safetensors file in the diffusers format, kohya's or PEFT's, or its folder.

    Returns:
        What the file is.

    Raises:
        UserError: Names the file, the tensor or layer that is wrong, and what to do.
    """
    file = find_file(path)
    facts = read_facts(file)  # a missing or damaged file is named
    if not isinstance(facts, dict):
        raise UserError(f"{file}: its facts of the training aren't a JSON object; export it again")
    content = _read(pipeline, file)
    _check_fit(pipeline, file, content)
    sizes = [tensor.numel() for own in content.weights.values() for k, tensor in own.items() if k != "alpha"]
    method = facts.get("method")
    return AdapterFacts(
        file=file,
        sha256=file_digest(file),
        method=method if isinstance(method, str) else None,
        rank=_range([len(weights["down"]) for weights in content.weights.values()]),
        alpha=_range(list(content.alphas.values())) if content.alphas else None,
        layers=len(content.weights),
        parameters=sum(sizes),
        parts=tuple(part for part in PREFIXES if any(part == own for own, _ in content.weights)),
        dora=any("magnitude" in weights for weights in content.weights.values()),
        facts=facts,
    )


def converted(
    pipeline: StableDiffusionXLPipeline, adapter: AdapterFacts
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The adapter in the diffusers format and PEFT's configurations; None where the file itself is in it.

    Of kohya's files diffusers leaves out DoRA and takes the most frequent alpha for all layers, and of others
    the DoRA of text encoders, so it is handed what they mean.

    Args:
        pipeline: The base that the adapter was checked against.
        adapter: From `check_adapter`.
    """
    content = _read(pipeline, adapter.file)
    if content.as_diffusers:
        return None
    return content.to_diffusers()


def check_loaded(pipeline: StableDiffusionXLPipeline, name: str, adapter: AdapterFacts) -> None:
    """Refuse an adapter of which diffusers has loaded something else than the file says.

    It is compared after loading, since no look at the file tells: diffusers passes over keys in mixed
    spellings, and PEFT over layers that its metadata don't name.

    Args:
        pipeline: With the adapter loaded.
        name: Under which it is loaded.
        adapter: From `check_adapter`.

    Raises:
        UserError: Names a layer whose tensors or scale didn't arrive, or that the file doesn't have.
    """
    if file_digest(adapter.file) != adapter.sha256:
        raise UserError(f"{adapter.file}: was replaced while it was read; load it again")
    content = _read(pipeline, adapter.file)
    modules = _modules(pipeline)
    loaded = {
        layer: module
        for layer, module in modules.items()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }
    for layer in sorted(loaded.keys() | content.weights.keys()):
        weights = content.weights.get(layer, {})
        if layer in loaded and _arrived(loaded[layer], name, weights, content.scales.get(layer, math.nan)):
            continue
        raise UserError(
            f"{adapter.file}: {'.'.join(layer)}: diffusers doesn't load what the file has for it; export it "
            "again"
        )


def _read(pipeline: StableDiffusionXLPipeline, file: Path) -> AdapterLayers:
    """The layers of a file that is to go onto this base."""
    text_encoders = {part: getattr(pipeline, part) for part in PREFIXES if part != "unet"}
    widths = {part: model.config.hidden_size for part, model in text_encoders.items()}
    is_convolution = functools.partial(_is_convolution, _modules(pipeline))
    return read_layers(file, pipeline.unet.config.layers_per_block, widths, is_convolution=is_convolution)


def _is_convolution(modules: dict[Layer, nn.Module], layer: Layer) -> bool:
    """Whether a layer is one in the base; by its name where the base lacks it."""
    module = modules.get(layer)
    if module is None:
        return is_convolution_by_name(layer)
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Conv2d)


def _modules(pipeline: StableDiffusionXLPipeline) -> dict[Layer, nn.Module]:
    """The layers of a pipeline that a LoRA can be on, or is on."""
    found = {}
    for part in PREFIXES:
        for path, module in getattr(pipeline, part).named_modules():
            if isinstance(module, LoraLayer):
                kind = module.get_base_layer()
            elif ".base_layer" in path or ".lora_" in path:
                continue
            else:
                kind = module
            if isinstance(kind, (nn.Linear, nn.Conv2d)):
                # Newer transformers dropped this level from CLIPTextModel.
                shortened = part != "unet" and not path.startswith("text_")
                found[part, f"text_model.{path}" if shortened else path] = module
    return found


def _check_fit(pipeline: StableDiffusionXLPipeline, file: Path, content: AdapterLayers) -> None:
    """Refuse layers that the base doesn't have, or has in another shape."""
    modules = _modules(pipeline)

    def refuse(reason: str) -> None:
        origin = _origin(pipeline, content)
        raise UserError(
            f"{file}: doesn't fit this base ({reason}{origin}); give an adapter that was trained on this base"
        )

    unknown = sorted(layer for layer in content.weights if layer not in modules)
    if unknown:
        refuse(f"{'.'.join(unknown[0])}, 1 of {len(unknown)} such layers, isn't in it")
    for layer, weights in sorted(content.weights.items()):
        module = modules[layer]
        expected = _shapes(module.get_base_layer() if isinstance(module, LoraLayer) else module, weights)
        for kind, shape in expected.items():
            if kind in weights and weights[kind].shape != shape:
                met = f"{'.'.join(layer)}: its {kind} weight is {list(weights[kind].shape)}"
                refuse(f"{met} and must be {list(shape)}")


def _shapes(base: nn.Module, weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the weights of a layer must have."""
    rank = len(weights["down"])
    shapes: dict[str, tuple[int, ...]]
    magnitude: tuple[int, ...]
    if isinstance(base, nn.Linear):
        shapes = {"down": (rank, base.in_features), "up": (base.out_features, rank)}
        magnitude = (base.out_features,)
    else:
        assert isinstance(base, nn.Conv2d), "_modules finds no other kind"
        shapes = {
            "down": (rank, base.in_channels, *base.kernel_size),
            "up": (base.out_channels, rank, 1, 1),
        }
        magnitude = (1, base.out_channels, 1, 1)
    return shapes | {"magnitude": magnitude}


def _origin(pipeline: StableDiffusionXLPipeline, content: AdapterLayers) -> str:
    """What gives an adapter of another model away: how many features of a prompt it takes."""
    takes = {
        weights["down"].shape[1]
        for (part, path), weights in content.weights.items()
        if part == "unet" and path.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    model = _PROMPT_FEATURES.get(min(takes, default=0))
    if len(takes) != 1 or model is None or takes == {pipeline.unet.config.cross_attention_dim}:
        return ""
    return f"; by its {min(takes)} prompt features it is for {model}"


def _arrived(module: LoraLayer, name: str, weights: dict[str, Tensor], scale: float) -> bool:
    """Whether a layer has exactly these weights, in the precision in which it holds them, and this scale."""
    held = {"down": weight_of(module.lora_A[name]), "up": weight_of(module.lora_B[name])}
    if name in module.lora_magnitude_vector:
        held["magnitude"] = weight_of(module.lora_magnitude_vector[name])
    same_scale = math.isclose(module.scaling[name], scale, rel_tol=1e-6)
    if held.keys() != weights.keys() - {"alpha"} or not same_scale:
        return False
    return all(
        own.shape == weights[kind].shape and torch.equal(own.detach(), weights[kind].to(own))
        for kind, own in held.items()
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low}-{high}"
