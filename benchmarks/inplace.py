"""The published way to perturb, to measure against: the noise goes into the weights themselves.

Before the forward pass it is added to the base weights in place, and after the backward pass it is subtracted
again. All of it must be kept in between, every layer's merged weight is formed to take its row norms, and in
half precision the subtraction does not restore the weights: the sum was rounded.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class InPlaceFlatLoRA:
    """Adds noise to the base weights of a model's LoRA layers, and takes it away.

    Args:
        model: A model with LoRA layers on linear layers.
        sigma: Strength of the noise, relative to the norm of each row of the merged weight.
        seed: Decides the noise.
    """

    def __init__(self, model: nn.Module, sigma: float, seed: int = 0) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._sigma = sigma
        device = self._layers[0].get_base_layer().weight.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._noises: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        """Call before the forward pass."""
        for layer in self._layers:
            weight = layer.get_base_layer().weight
            merged = weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
            std = self._sigma / merged.shape[1] ** 0.5 * merged.norm(dim=1, keepdim=True)
            normals = torch.randn(
                weight.shape, generator=self._generator, dtype=weight.dtype, device=weight.device
            )
            noise = normals.mul_(std)
            weight.data += noise
            self._noises.append(noise)

    @torch.no_grad()
    def restore(self) -> None:
        """Call after the backward pass."""
        for layer, noise in zip(self._layers, self._noises, strict=True):
            layer.get_base_layer().weight.data -= noise
        self._noises.clear()
