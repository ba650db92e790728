"""The base layer alone with `W + eps`: the reference path, for layers that the fused one doesn't know.

PEFT's layer stays as it is (DoRA, dropout, several adapters, AdaLoRA, quantised bases); only its base layer's
product is replaced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input  # pyright: ignore[reportUnknownVariableType]

from flatlora_diffusion.flat.noise import Draw
from flatlora_diffusion.flat.quantized import QuantizedWeight, is_of_bitsandbytes

Base = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What can be perturbed; the linear layers of bitsandbytes are `nn.Linear` too."""
_CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, conv1d_input),
    nn.Conv2d: (F.conv2d, conv2d_input),
    nn.Conv3d: (F.conv3d, conv3d_input),
}
"""Kind of convolution -> it as a function, and the gradient of its input."""


class _Context(FunctionCtx):
    """What `_NoisyForward` keeps for its backward pass."""

    base: NoisyBase
    draw: Draw | None
    x_shape: torch.Size
    x_dtype: torch.dtype
    channel_dim: int
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _NoisyForward(torch.autograd.Function):
    """A base layer's product with `W + eps`, keeping W's reference and the draw, neither noise nor sum.

    Under autocast the sum is formed in the weight's own dtype and then cast, as autocast does with a weight.
    The weight is frozen; the bias may be trained.
    """

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, stored: Tensor, bias: Tensor | None, base: NoisyBase, draw: Draw | None
    ) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.base, ctx.draw = base, draw
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.channel_dim = 1 if stored.dim() > 2 else -1
        # A linear layer returns a view of a matrix product, which autograd would protect from being modified
        # in place, as AdaLoRA does; `.data` is no view.
        return base.product(x, base.weight_under(draw, stored), bias).data

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            (stored,) = ctx.saved_tensors
            noisy = ctx.base.weight_under(ctx.draw, stored).to(grad.dtype)
            with torch.autocast(grad.device.type, enabled=False):
                grad_x = ctx.base.input_grad(grad, noisy, ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.movedim(ctx.channel_dim, 0).flatten(1).sum(dim=1)
        return grad_x, None, grad_bias, None, None


class NoisyBase:
    """Computes what a base layer computes, with `W + eps` in the place of W.

    Args:
        layer: The base layer; its weight is never written.
        quantized: Reads the weight where bitsandbytes holds it.
    """

    def __init__(self, layer: Base, quantized: QuantizedWeight | None) -> None:
        self._layer, self._quantized = layer, quantized

    def __call__(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """The base layer's result for an input x under the noise of a draw, or without noise."""
        bias = self._layer.bias
        if self._quantized is None:
            return self._apply(x, bias, draw)
        dtype = self._quantized.compute_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        return self._apply(x.to(dtype), bias, draw).to(x.dtype)

    def weight_in(self, stored: Tensor) -> Tensor:
        """W (m, n) or (m, in, *kernel) from the tensor that holds it; where it is quantised, a new tensor."""
        return stored if self._quantized is None else self._quantized.dequantized()

    def weight_under(self, draw: Draw | None, stored: Tensor) -> Tensor:
        """`W + eps`, or W where there is no noise."""
        weight = self.weight_in(stored)
        return weight if draw is None else draw.added_to(weight)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes of an input, with another weight."""
        if self._quantized is not None:
            weight = weight.to(x.dtype)
        layer = self._layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        convolve, _ = _CONVOLUTIONS[type(layer)]
        return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def input_grad(self, grad: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        """Gradient of the input from that of the result."""
        layer = self._layer
        if isinstance(layer, nn.Linear):
            return grad @ weight
        _, input_gradient = _CONVOLUTIONS[type(layer)]
        return input_gradient(
            x_shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups
        )

    def _apply(self, x: Tensor, bias: Tensor | None, draw: Draw | None) -> Tensor:
        return _NoisyForward.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            x, self._layer.weight, bias, self, draw
        )


def compute_dequantized(model: nn.Module) -> None:
    """Have the 8-bit layers of bitsandbytes compute with their dequantised weights, as they do under noise.

    By themselves they round their input to 8 bits too: plain LoRA would be trained on another base than
    Flat-LoRA. Those in 4 bits compute so in any case.

    Args:
        model: Its layers hold quantised weights.
    """
    for module in model.modules():
        if is_of_bitsandbytes(module) and module.weight.dtype == torch.int8:
            module.__dict__["forward"] = NoisyBase(module, QuantizedWeight(module))
