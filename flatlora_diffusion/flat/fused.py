"""A whole LoRA layer under noise as one operation: base product, low-rank branch and both backward passes.

PEFT's layer runs some ten operations, each with a node of autograd. Here they are one:

    Wn = W + eps                     h  = x A^T
    y  = x Wn^T + bias + s h B^T     saved: x, h, and references to W, A, B

    gh = s g B                       dB = s g^T h
    dA = gh^T x                      dx = g Wn + gh A          (Wn formed again from the draw)

The low-rank branch is added to the product, never to the weight: an update smaller than the weight's rounding
would be lost in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from flatlora_diffusion.flat.noise import Draw

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


class _Context(FunctionCtx):
    """What the forward pass keeps for the backward pass."""

    draw: Draw
    scaling: float
    geometry: Geometry
    x_shape: torch.Size
    x_dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


def compute_dtype(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> torch.dtype | None:
    """The dtype in which PEFT's layer would compute every product, or None where it mixes several.

    That is autocast's, where it is on, else the one that input and weights share.
    """
    dtype, kind = x.dtype, x.device.type
    if torch.is_autocast_enabled(kind):
        doubles = torch.float64 in (dtype, weight.dtype, a.dtype, b.dtype)  # autocast leaves them alone
        return None if doubles else torch.get_autocast_dtype(kind)
    return dtype if weight.dtype is dtype and a.dtype is dtype and b.dtype is dtype else None


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Twenty such casts a layer and step do nothing: asking first is ten times cheaper.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class FusedLinear(torch.autograd.Function):
    """`x (W + eps)^T + bias + s (x A^T) B^T` for x (..., n), W (m, n), A (r, n), B (m, r).

    W is frozen; the bias may be trained. Under autocast all of them are cast as autocast casts weights: W
    after the noise has been added.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        draw: Draw,
        dtype: torch.dtype,
    ) -> Tensor:
        """Compute the layer, its operands cast to `dtype`."""
        shape = x.shape
        ctx.x_shape, ctx.x_dtype = shape, x.dtype
        ctx.draw, ctx.scaling = draw, scaling
        rows = _as(x.reshape(-1, shape[-1]), dtype)
        h = F.linear(rows, _as(a, dtype))
        noisy = _as(draw.added_to(weight), dtype)
        y = F.linear(rows, noisy, None if bias is None else _as(bias, dtype))
        y.addmm_(h, _as(b, dtype).t(), alpha=scaling)
        ctx.save_for_backward(rows, h, weight, a, b)
        # A view could not be modified in place by whoever calls the layer; `.data` is none.
        return y.view(*shape[:-1], -1).data

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Form `W + eps` again and give the gradients of x, bias, A and B."""
        if torch.is_autocast_enabled(grad.device.type):  # the dtype is that of the forward pass
            with torch.autocast(grad.device.type, enabled=False):
                return FusedLinear._gradients(ctx, grad)
        return FusedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: _Context, grad: Tensor) -> Gradients:
        rows, h, weight, a, b = ctx.saved_tensors
        dtype, scaling = grad.dtype, ctx.scaling
        grad = grad.reshape(-1, grad.shape[-1])
        grad_h = torch.mm(grad, _as(b, dtype))
        grad_b = torch.mm(grad.t(), h)
        if scaling != 1:
            grad_h.mul_(scaling)
            grad_b.mul_(scaling)
        grad_a = torch.mm(grad_h.t(), rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            noisy = _as(ctx.draw.added_to(weight), dtype)
            grad_rows = torch.mm(grad, noisy).addmm_(grad_h, _as(a, dtype))
            grad_x = _as(grad_rows.view(ctx.x_shape), ctx.x_dtype)
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, _as(grad_a, a.dtype), _as(grad_b, b.dtype), None, None, None


class FusedConvolution(torch.autograd.Function):
    """The same for a convolution W (m, in, *kernel) with A (r, in, *kernel) and B (m, r, *ones)."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        draw: Draw,
        dtype: torch.dtype,
        geometry: Geometry,
    ) -> Tensor:
        """Compute the layer, its operands cast to `dtype`."""
        image = _as(x, dtype)
        h = _convolve(image, _as(a, dtype), None, geometry)
        noisy = _as(draw.added_to(weight), dtype)
        y = _convolve(image, noisy, None if bias is None else _as(bias, dtype), geometry)
        y.add_(_convolve(h, _as(b, dtype), None, _pointwise(geometry)), alpha=scaling)
        ctx.save_for_backward(image, h, weight, a, b)
        ctx.draw, ctx.scaling, ctx.geometry, ctx.x_dtype = draw, scaling, geometry, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Form `W + eps` again and give the gradients of x, bias, A and B."""
        image, h, weight, a, b = ctx.saved_tensors
        dtype, geometry = grad.dtype, ctx.geometry
        wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        with torch.autocast(grad.device.type, enabled=False):  # the dtype is that of the forward pass
            grad_h, grad_b = _convolve_backward(grad * ctx.scaling, h, _as(b, dtype), _pointwise(geometry))
            low_x, grad_a = _convolve_backward(grad_h, image, _as(a, dtype), geometry, wants_x)
            grad_x = None
            if wants_x:
                noisy = _as(ctx.draw.added_to(weight), dtype)
                base_x, _ = _convolve_backward(grad, image, noisy, geometry, wants_weight=False)
                grad_x = _as(base_x.add_(low_x), ctx.x_dtype)
            grad_bias = grad.movedim(1, 0).flatten(1).sum(dim=1) if wants_bias else None
        gradients = grad_x, None, grad_bias, _as(grad_a, a.dtype), _as(grad_b, b.dtype)
        return *gradients, None, None, None, None


def _pointwise(geometry: Geometry) -> Geometry:
    """That of B: a kernel of one."""
    ones = [1] * len(geometry.stride)
    return Geometry(ones, [0] * len(ones), ones)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    none = [0] * len(geometry.stride)
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, 1)


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wants_x: bool = True,
    wants_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and weight; of one that is not wanted, nothing is computed."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.stride),
        1,
        [wants_x, wants_weight, False],
    )
    return grad_x, grad_weight
