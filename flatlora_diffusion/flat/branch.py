"""The low-rank branch of a LoRA layer, and whether the fused operation may compute it in PEFT's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear, LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.flat.fused import Geometry

_PLAIN = (Linear, Conv1d, Conv2d, Conv3d)
"""The layers of PEFT whose forward pass the fused operation knows; AdaLoRA's, say, is another."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(slots=True)
class Branch:
    """A branch that the fused operation computes.

    Attributes:
        a: The weight (r, n), or (r, in, *kernel).
        b: The weight (m, r), or (m, r, *ones).
        scaling: Factor s of the branch.
        geometry: That of a convolution.
        modules: Those of A, B and dropout, which are passed by.
        hooks: What somebody may hang onto the modules and the base layer: dictionaries that are empty.
    """

    a: Tensor
    b: Tensor
    scaling: float
    geometry: Geometry | None
    modules: tuple[nn.Module, nn.Module, nn.Module]
    hooks: Sequence[dict[Any, Any]]

    def is_plain_in(self, layer: LoraLayer, name: str) -> bool:
        """Whether neither a variant nor dropout has come to the layer's adapter."""
        return name not in layer.lora_variant and layer.lora_dropout[name] is self.modules[2]

    def is_passable(self) -> bool:
        """Whether nobody notices that the modules are never called."""
        if any(self.hooks):
            return False
        a, b, dropout = self.modules
        return not ("forward" in a.__dict__ or "forward" in b.__dict__ or "forward" in dropout.__dict__)


def branch_of(layer: LoraLayer, name: str, scaling: float) -> Branch | None:
    """The branch of a layer's only active adapter, if it is PEFT's plain one: no variant, dropout or bias.

    Args:
        layer: On a base layer that is not quantised.
        name: Of the adapter.
        scaling: Factor s of the branch.
    """
    if type(layer) not in _PLAIN or name in layer.lora_variant:
        return None
    base, a, b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity):
        return None
    if any(type(factor) is not type(base) or isinstance(factor.bias, Tensor) for factor in (a, b)):
        return None
    geometry = _geometry(base)
    if _geometry(a) != geometry:  # PEFT gives A no dilation
        return None
    modules = a, b, dropout
    hooks = [getattr(module, kind) for module in (base, *modules) for kind in _HOOKS]
    return Branch(weight_of(a), weight_of(b), scaling, geometry, modules, hooks)


def _geometry(module: nn.Module) -> Geometry | None:
    """How a convolution moves; None for a linear layer."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    assert not isinstance(module.padding, str)  # such a base is not supported
    return Geometry(module.stride, module.padding, module.dilation)
