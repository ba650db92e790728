"""Tensors that know their device, dtype and shape, but no numbers: no driver is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flatlora_diffusion.flat import layer, noise


@contextlib.contextmanager
def without_a_driver() -> Iterator[None]:
    """Fake tensors for all; what asks a driver, or a tensor's address, is answered here."""

    def normals(draw: noise.GaussianDraw) -> Tensor:
        std = draw.row_std
        return torch.randn((len(std), draw.inputs), dtype=std.dtype, device=std.device)

    def version(tensor: Tensor) -> tuple[object, ...]:
        return id(tensor), tensor._version, tensor.dtype, tensor.device

    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()),
            (noise.GaussianDraw, "_normals", normals),
            (layer, "_version", version),
            (nn.Module, "_apply", _apply),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which would write through `.data`: fake tensors don't change their device."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = function(parameter.detach())
            if moved is not parameter and (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
                _move_quantized(parameter, module._parameters[name])
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _move_quantized(parameter: nn.Parameter, moved: nn.Parameter) -> None:
    """Take what bitsandbytes keeps beside a weight along with it."""
    if hasattr(parameter, "quant_state"):
        moved.quant_state = parameter.quant_state
        moved.quant_state.to(moved.device)
    elif hasattr(parameter, "SCB"):
        moved.CB, moved.SCB = moved, parameter.SCB.to(moved.device)
