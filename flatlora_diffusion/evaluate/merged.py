"""UNets with an adapter merged into their weights, and those weights for others in their place."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.draw.active import activate, parts_of


def merged_unet(
    pipeline: StableDiffusionXLPipeline, adapter: str | None, scale: float = 1.0
) -> UNet2DConditionModel:
    """A copy of the UNet whose weights are `W + scale * s*B@A`, without PEFT layers; in `eval()`.

    Args:
        pipeline: The adapter is active in it afterwards.
        adapter: Name under which it was loaded, or None for the base.
        scale: Of its update.
    """
    activate(pipeline, adapter, scale)
    unet = copy.deepcopy(pipeline.unet).eval().requires_grad_(False)
    if not hasattr(unet, "peft_config"):
        return unet
    own = (
        [] if adapter is None else [part for part in parts_of(pipeline, adapter) if part in unet.peft_config]
    )
    if own:
        unet.fuse_lora(adapter_names=own)
    unet.unload_lora()
    return unet


def adapted_layers(unet: nn.Module, adapters: Iterable[str]) -> list[str]:
    """Names of the layers that carry any of these adapters, by name; merged UNets have the same names."""
    adapters = set(adapters)
    return sorted(
        name
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer) and not adapters.isdisjoint(module.lora_A)
    )


def filters(unet: nn.Module) -> list[str]:
    """Names of all layers that have filters: every linear and convolutional one."""
    return [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def filter_norms(weight: Tensor) -> Tensor:
    """Norm of each filter of a weight (m, ...): (m, 1, ...), float32."""
    norms = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
    return norms.view(-1, *[1] * (weight.dim() - 1))


@contextmanager
def replaced(unet: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """The UNet with other weights in some layers inside the block; its own tensors after it.

    Args:
        unet: A merged one: without PEFT layers.
        weights: Layer -> weight, in the shape of its own.
    """
    own = {name: weight_of(unet.get_submodule(name)).data for name in weights}
    try:
        for name, weight in weights.items():
            weight_of(unet.get_submodule(name)).data = weight.to(own[name].dtype)
        yield
    finally:
        for name, weight in own.items():
            weight_of(unet.get_submodule(name)).data = weight
