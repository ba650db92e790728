"""How much each LoRA layer changes its base weight, and a limit to it (max-norm regularisation)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.sdxl.lora import ADAPTER, FROZEN_ADAPTER


class UpdateNorms:
    """Frobenius norms of the updates `s*B@A` of the LoRA layers of some models.

    `||B@A||^2 = tr((B^T B)(A A^T))` needs no matrix of the weight's size. Where a frozen adapter takes B0@A0
    away, the update is `s*(B@A - B0@A0)`. DoRA's rescaling is not counted.

    Args:
        models: With LoRA layers.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._layers = [
            module for model in models for module in model.modules() if isinstance(module, LoraLayer)
        ]

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The norm of each layer's update: (layers,), float32, on the first layer's device.

        Text encoders that are trained no further are on the CPU.
        """
        groups: dict[tuple[torch.Size, torch.Size, torch.device], list[int]] = {}
        factors = [_factors(layer) for layer in self._layers]
        for index, (a, b) in enumerate(factors):
            groups.setdefault((a.shape, b.shape, a.device), []).append(index)
        norms = factors[0][0].new_empty(len(factors))
        for indices in groups.values():  # those of one shape together: it saves hundreds of small operations
            a = torch.stack([factors[index][0] for index in indices])
            b = torch.stack([factors[index][1] for index in indices])
            squares = ((b.mT @ b) * (a @ a.mT)).sum(dim=(1, 2))
            norms[indices] = squares.clamp_min(0).sqrt().to(norms.device)
        return norms

    @torch.no_grad()
    def limit(self, greatest: float) -> tuple[Tensor, int]:
        """Scale A and B of every layer whose norm is greater by one factor each, so that it is `greatest`.

        Returns:
            The norms afterwards, (layers,), and how many layers were scaled.
        """
        norms = self.measure()
        over = (norms > greatest).nonzero().flatten().tolist()
        for index in over:
            # A number, which goes with tensors of every device.
            layer, factor = self._layers[index], (greatest / norms[index]).sqrt().item()
            weight_of(layer.lora_A[ADAPTER]).mul_(factor)
            weight_of(layer.lora_B[ADAPTER]).mul_(factor)
        return norms.clamp(max=greatest), len(over)


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r), times the scale, of a layer's update."""
    a, b = _weights(layer, ADAPTER)
    scaling = layer.scaling[ADAPTER]
    if FROZEN_ADAPTER in layer.lora_A:
        a0, minus_b0 = _weights(layer, FROZEN_ADAPTER)
        # B A - B0 A0 = (B - B0) A + B0 (A - A0), in which nothing large cancels.
        a, b = torch.cat([a, a - a0]), torch.cat([b + minus_b0, -minus_b0], dim=1)
    return a, b * scaling


def _weights(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) of one adapter."""
    return weight_of(layer.lora_A[adapter]).flatten(1), weight_of(layer.lora_B[adapter]).flatten(1)
