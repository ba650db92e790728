"""Merged weights that are shaken: by Flat-LoRA's own noise, or by rounding to a few bits.

`W' = W + s*B@A` is what a layer computes with (arXiv 2409.14396). A flat minimum is one where changes of `W'`
do little; here pictures are drawn with such changes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.sdxl.lora import TEXT_ENCODERS


@dataclass(frozen=True)
class Shake:
    """What is done to merged weights.

    Attributes:
        sigma: Strength of the noise, relative to each filter's norm (equation 7); 0 for none.
        bits: Each filter is rounded to so many bits first; None for no rounding.
        draw: Which noise: the same one for every method.

    Raises:
        ValueError: Sigma isn't finite and at least 0, or there are fewer than 2 bits.
    """

    sigma: float = 0.0
    bits: int | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.sigma) or self.sigma < 0:
            raise ValueError(f"sigma={self.sigma} must be finite and >= 0")
        if self.bits is not None and self.bits < 2:
            raise ValueError(f"bits={self.bits} must be at least 2")


@contextlib.contextmanager
def shaken(pipeline: StableDiffusionXLPipeline, adapter: str | None, shake: Shake) -> Iterator[None]:
    """Within the block the merged weights of the active adapter, or those of the base, are shaken.

    All layers are that any loaded adapter has, of the UNet and the text encoders: for every method the same
    ones. Afterwards each weight has its bits again.

    Args:
        pipeline: With its adapters; one of them, or none, was made active with its scale, and stays so.
        adapter: Name of the active one; None for the base.
        shake: How.
    """
    layers = _layers(pipeline)
    before = {
        name: [tensor.detach().to("cpu", copy=True) for tensor in layer.get_base_layer().parameters()]
        for name, layer in layers.items()
    }
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                if adapter is not None:
                    layer.merge()
                weight = weight_of(layer.get_base_layer())
                weight.copy_(shaken_weight(weight, name, shake))
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                if layer.merged:
                    layer.unmerge()
                for tensor, own in zip(layer.get_base_layer().parameters(), before[name], strict=True):
                    tensor.copy_(own)


def shaken_weight(weight: Tensor, name: str, shake: Shake) -> Tensor:
    """A shaken copy of a merged weight, (m, ...) with m filters.

    `eps[i,j] = sigma / sqrt(n) * ||W'[i,:]|| * z[i,j]`, the z being a function of (draw, name). Rounding is
    to the nearest of `2^bits - 1` values, evenly spaced from minus the filter's largest magnitude to that.
    """
    rows = weight.detach().float().flatten(1)
    if shake.bits is not None:
        most = 2 ** (shake.bits - 1) - 1
        step = (rows.abs().amax(1, keepdim=True) / most).clamp_min(torch.finfo(torch.float32).tiny)
        rows = (rows / step).round() * step
    if shake.sigma:
        z = torch.randn(rows.shape, generator=keyed_generator("shake", shake.draw, name)).to(rows.device)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows + shake.sigma / math.sqrt(rows.shape[1]) * norms * z
    return rows.reshape(weight.shape).to(weight.dtype)


def _layers(pipeline: StableDiffusionXLPipeline) -> dict[str, BaseTunerLayer]:
    return {
        f"{part}.{name}": module
        for part in ("unet", *TEXT_ENCODERS)
        for name, module in getattr(pipeline, part).named_modules()
        if isinstance(module, LoraLayer) and isinstance(module, BaseTunerLayer)
    }
