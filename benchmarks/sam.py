"""Sharpness-aware minimisation (arXiv 2010.01412), to measure against: the step up the loss, and back.

A first forward and backward pass finds the gradient; the second one is taken after a step of a given length
along it. On merged weights that gradient, which `W + s*B@A` shares with W, is as large as all the base
weights that have a LoRA. Nothing else of that size is kept: the moved weights take the gradient's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn


def lora_layers(models: Iterable[nn.Module]) -> list[LoraLayer]:
    """The LoRA layers of some models."""
    return [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]


def base_weights(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The frozen weights under LoRA layers: `W + s*B@A` moves as W does, and has the same gradient."""
    return [layer.get_base_layer().weight for layer in lora_layers(models)]


@contextmanager
def given_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A backward pass inside the block gives them gradients; frozen ones are frozen again after it."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def ascended(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Parameters moved by `rho * g / ||g||` inside the block, and their very tensors after it (equation 2).

    Args:
        parameters: With gradients, which are gone inside the block. What has none, such as the last layer of
            the first text encoder, doesn't move.
        rho: Length of the step, over all of them together.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in moved]
    length = torch.linalg.vector_norm(torch.stack(norms)).item()
    own = [parameter.data for parameter in moved]
    try:
        for parameter in moved:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = torch.add(parameter.data, gradient, alpha=rho / (length + 1e-12), out=gradient)
        yield
    finally:
        for parameter, data in zip(moved, own, strict=True):
            parameter.data = data
