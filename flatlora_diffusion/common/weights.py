"""The weight of a layer, for type checkers too: torch tells them of no attribute of a module."""

from __future__ import annotations

from torch import Tensor, nn


def weight_of(module: nn.Module) -> Tensor:
    """The parameter `weight` of a layer, as it is stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
