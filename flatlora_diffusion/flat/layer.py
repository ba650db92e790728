"""One LoRA layer of PEFT under noise: what its merged weight is, and a forward pass with `W + eps`.

The base weight is never written. While a layer is perturbed, the `forward` of its base layer is replaced by
one that computes with a transient `W + eps`; the backward pass builds the sum again from the noise's key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear, LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input  # pyright: ignore[reportUnknownVariableType]
from torch.utils.hooks import RemovableHandle

from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.flat.noise import Draw, NoiseSource, with_noise
from flatlora_diffusion.flat.quantized import QuantizedWeight, is_of_bitsandbytes, is_quantized
from flatlora_diffusion.flat.row_norms import merged_row_norms, row_norms_squared

_DORA_VARIANTS = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_PEFT_ON_BITSANDBYTES = "peft.tuners.lora.bnb"  # not imported here: it would import bitsandbytes

Base = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What can be perturbed; the linear layers of bitsandbytes are `nn.Linear` too."""
_BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, conv1d_input),
    nn.Conv2d: (F.conv2d, conv2d_input),
    nn.Conv3d: (F.conv3d, conv3d_input),
}
"""Kind of convolution -> it as a function, and the gradient of its input."""


class _Context(FunctionCtx):
    """What `_NoisyForward` keeps for its backward pass."""

    draw: Draw
    read: Callable[[Tensor], Tensor]
    input_grad: Callable[[Tensor, Tensor, torch.Size], Tensor]
    x_shape: torch.Size
    x_dtype: torch.dtype
    channel_dim: int
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _NoisyForward(torch.autograd.Function):
    """`apply_weight(x, W + eps, bias)`, keeping W's reference and the draw: neither the noise nor the sum.

    `read` makes W of what is stored: the same tensor, or where it is quantised a new one in either pass.
    Under autocast the sum is formed in the weight's own dtype and then cast, as autocast does with a weight.
    The weight is frozen; the bias may be trained.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        stored: Tensor,
        bias: Tensor | None,
        draw: Draw,
        read: Callable[[Tensor], Tensor],
        apply_weight: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        input_grad: Callable[[Tensor, Tensor, torch.Size], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.draw, ctx.read, ctx.input_grad = draw, read, input_grad
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.channel_dim = 1 if stored.dim() > 2 else -1
        # A linear layer returns a view of a matrix product, which autograd would protect from being modified
        # in place, as AdaLoRA does; `.data` is no view.
        return apply_weight(x, with_noise(read(stored), draw), bias).data

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            (stored,) = ctx.saved_tensors
            noisy = with_noise(ctx.read(stored), ctx.draw).to(grad.dtype)
            with torch.autocast(grad.device.type, enabled=False):
                grad_x = ctx.input_grad(grad, noisy, ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.movedim(ctx.channel_dim, 0).flatten(1).sum(dim=1)
        return grad_x, None, grad_bias, None, None, None, None


def _version(tensor: Tensor) -> tuple[object, ...]:
    """Changes whenever the tensor is written in place, replaced, cast or moved."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device


def _use_base_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give DoRA the (perturbed) base layer's result where it would multiply by the base weight itself."""
    if kwargs.get("base_result") is None:
        kwargs = {**kwargs, "base_result": kwargs["base_layer"](*args)}
    return args, kwargs


class PerturbedLayer:
    """A LoRA layer whose base weight can be perturbed for the length of a forward pass.

    Args:
        name: Qualified name, for messages.
        layer: A LoRA, DoRA or AdaLoRA layer of PEFT on a linear layer, or LoRA or DoRA on a convolution or on
            a 4-bit or 8-bit linear layer of bitsandbytes. The noise is then on the dequantised weight, with
            which the perturbed layer computes. (Unperturbed, `Linear8bitLt` rounds its input to 8 bits too,
            on a GPU always and on a CPU in eval mode.)

    Raises:
        ValueError: The layer is of a kind whose merged weight is not known here.
    """

    def __init__(self, name: str, layer: LoraLayer) -> None:
        self.name = name
        self.layer = layer
        self.base: Base = _supported_base(name, layer)
        self._quantized = QuantizedWeight(self.base) if is_of_bitsandbytes(self.base) else None
        self._weight_norms: tuple[tuple[object, ...], Tensor] | None = None
        self._row_norms: tuple[list[object], Tensor] | None = None
        self._draw: tuple[tuple[object, ...], Draw] | None = None
        self._perturbed = False
        self._replaced_forward: Callable[..., Tensor] | None = None
        self._dora_hooks: list[RemovableHandle] = []

    @property
    def weight(self) -> Tensor:
        """The frozen base weight W, (m, n) or (m, in, *kernel); where it is quantised, a new tensor."""
        return self._read(self.base.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Filters m, and inputs n of each: a convolution counts as (m, in * kernel)."""
        shape = (self._quantized or self.base.weight).shape
        return shape[0], shape[1:].numel()

    @property
    def training(self) -> bool:
        """Whether the layer is in `train()` mode."""
        assert isinstance(self.layer, nn.Module)  # PEFT's `LoraLayer` is a mixin
        return self.layer.training

    def active_adapters(self) -> list[str]:
        """Names of the adapters that the forward pass adds to the base weight just now."""
        if self.layer.disable_adapters or self.layer.merged:
            return []
        return [name for name in self.layer.active_adapters if name in self.layer.lora_A]

    def row_norms_are_current(self) -> bool:
        """Whether `row_norms` still belongs to the weights as they are."""
        return self._row_norms is not None and self._row_norms[0] == self._state()

    @property
    def row_norms(self) -> Tensor:
        """Norm of each row of `W + sum_k s_k B_k A_k`, before any rescaling by DoRA: (m,), float32."""
        assert self._row_norms is not None, "refresh_row_norms comes first"
        return self._row_norms[1]

    def keep_row_norms(self, row_norms: Tensor) -> None:
        """Take over what `refresh_row_norms` computed."""
        self._row_norms = self._state(), row_norms
        self._draw = None

    def forget_row_norms(self) -> None:
        """The adapter may have changed in a way that `row_norms_are_current` cannot notice."""
        self._row_norms = None

    def reject_mixed_dora(self) -> None:
        """Raise ValueError where DoRA is active together with other adapters."""
        active = self.active_adapters()
        if len(active) > 1 and any(name in self.layer.lora_magnitude_vector for name in active):
            raise ValueError(
                f"{self.name}: DoRA together with other active adapters ({', '.join(active)}) has no single "
                "merged weight; activate one adapter"
            )

    def dora_scale(self) -> Tensor | None:
        """DoRA's factor `magnitude / ||W'_i||` on each row of the merged weight: (m,), float32; else None."""
        for name in self.active_adapters():
            if name in self.layer.lora_magnitude_vector:
                magnitude = weight_of(self.layer.lora_magnitude_vector[name]).detach()
                return magnitude.float().flatten() / self.row_norms
        return None

    def draw(self, sigma: float, source: NoiseSource, key: int) -> Draw:
        """The noise on the base weight, of standard deviation `sigma / sqrt(n) * ||W'_i||` (equation 7)."""
        request = (sigma, source, key)
        if self._draw is None or self._draw[0] != request:
            inputs = self.shape[1]
            dtype = (self._quantized or self.base.weight).dtype
            row_std = (self.row_norms * (sigma / inputs**0.5)).to(dtype)
            self._draw = request, source.draw(key, row_std, inputs)
        return self._draw[1]

    def perturb(self, draw: Draw) -> None:
        """Make the base layer compute with `W + eps` until `restore` is called."""

        def forward(input: Tensor) -> Tensor:
            bias = self.base.bias
            if self._quantized is None:
                return self._noisy_forward(input, bias, draw)
            dtype = self._quantized.compute_dtype(input)
            bias = None if bias is None else bias.to(dtype)
            return self._noisy_forward(input.to(dtype), bias, draw).to(input.dtype)

        # The attribute of the instance shadows the method; somebody else's may be there already.
        self._replaced_forward = self.base.__dict__.get("forward")
        self.base.forward = forward
        self._perturbed = True
        # DoRA with dropout multiplies by the base weight itself instead of calling the base layer.
        for vector in self.layer.lora_magnitude_vector.values():
            self._dora_hooks.append(vector.register_forward_pre_hook(_use_base_layer, with_kwargs=True))

    def restore(self) -> None:
        """Undo `perturb`; does nothing where there is nothing to undo."""
        if not self._perturbed:
            return
        if self._replaced_forward is None:
            del self.base.forward
        else:
            self.base.forward = self._replaced_forward
        self._replaced_forward = None
        self._perturbed = False
        while self._dora_hooks:
            self._dora_hooks.pop().remove()

    def _noisy_forward(self, x: Tensor, bias: Tensor | None, draw: Draw) -> Tensor:
        return _NoisyForward.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            x, self.base.weight, bias, draw, self._read, self._apply_weight, self._input_grad
        )

    def _read(self, stored: Tensor) -> Tensor:
        """W from the tensor that holds it."""
        return stored if self._quantized is None else self._quantized.dequantized()

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._quantized is not None:
            weight = weight.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return F.linear(x, weight, bias)
        conv = self.base
        convolve, _ = _CONVOLUTIONS[type(conv)]
        return convolve(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _input_grad(self, grad: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return grad @ weight
        conv = self.base
        _, input_gradient = _CONVOLUTIONS[type(conv)]
        return input_gradient(x_shape, weight, grad, conv.stride, conv.padding, conv.dilation, conv.groups)

    def weight_norms_squared(self) -> Tensor:
        """Squared norm of each row of the base weight: (m,), float32; computed once."""
        version = _version(self.base.weight)
        if self._weight_norms is None or self._weight_norms[0] != version:
            self._weight_norms = version, row_norms_squared(self.weight.detach().flatten(1))
        return self._weight_norms[1]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) in float32 with `dW = B @ A`, over all active adapters."""
        factors_a: list[Tensor] = []
        factors_b: list[Tensor] = []
        for name in self.active_adapters():
            a, b = _factor(self.layer.lora_A, name), _factor(self.layer.lora_B, name)
            scaling = self._scaling(name)
            if isinstance(self.layer, SVDLinear):  # dW = B @ (A * E) * scaling / ranknum, as PEFT computes it
                scaling = scaling / (self.layer.ranknum[name] + 1e-5)
                a = a * self.layer.lora_E[name]
            else:
                a, b = a.flatten(1), b.flatten(1)
            factors_a.append(a.float())
            factors_b.append(b.float() * scaling)
        if len(factors_a) == 1:
            return factors_a[0], factors_b[0]
        m, n = self.shape
        none = torch.empty(0, device=self.base.weight.device)  # there may be no active adapter
        return (
            torch.cat([none.view(0, n), *factors_a]),
            torch.cat([none.view(m, 0), *factors_b], dim=1),
        )

    def _state(self) -> list[object]:
        """All that the merged weight depends on."""
        state: list[object] = [_version(self.base.weight)]
        groups: list[nn.ModuleDict | nn.ParameterDict] = [self.layer.lora_A, self.layer.lora_B]
        if isinstance(self.layer, SVDLinear):
            groups.append(self.layer.lora_E)
        for name in self.active_adapters():
            state += [name, self._scaling(name)]
            state += [_version(_factor(group, name)) for group in groups if name in group]
        return state

    def _scaling(self, name: str) -> float:
        return self.layer.scaling[name]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _factor(group: nn.ModuleDict | nn.ParameterDict, name: str) -> Tensor:
    """A or B of an adapter: PEFT keeps a layer with that weight, for AdaLoRA the parameter itself."""
    entry = group[name]
    return entry if isinstance(entry, Tensor) else weight_of(entry)


def _supported_base(name: str, layer: LoraLayer) -> Base:
    """The layer under the adapter, where its merged weight is known here; else ValueError."""
    base = layer.get_base_layer()
    quantized = is_of_bitsandbytes(base)
    known = isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d, SVDLinear))
    if not known and type(layer).__module__ != _PEFT_ON_BITSANDBYTES:
        problem = f"a {type(layer).__module__}.{type(layer).__qualname__} adapter"
    elif quantized and not is_quantized(base):
        problem = f"a {type(base).__qualname__} whose weight isn't quantised (yet: .to(device) does it)"
    elif not isinstance(base, _BASES) or not (quantized or type(base) in _BASES):
        problem = f"a base layer of type {type(base).__qualname__}"
    elif getattr(layer, "fan_in_fan_out", False):
        problem = "fan_in_fan_out=True"
    elif base.weight.is_meta:
        problem = "a base weight that is offloaded (on the meta device)"
    elif base.weight.requires_grad:
        problem = "a base weight that is trained too (requires_grad=True)"
    elif not quantized and not base.weight.is_floating_point():
        problem = f"a base weight of dtype {base.weight.dtype}"
    elif getattr(base, "groups", 1) != 1 or getattr(base, "padding_mode", "zeros") != "zeros":
        problem = f"a convolution with groups={base.groups}, padding_mode={base.padding_mode!r}"
    elif isinstance(getattr(base, "padding", 0), str):
        problem = f"a convolution with padding={base.padding!r}"
    else:
        variants = [v for v in layer.lora_variant.values() if not isinstance(v, _DORA_VARIANTS)]
        if not variants:
            return base
        problem = f"the LoRA variant {type(variants[0]).__qualname__}"
    raise ValueError(
        f"{name}: Flat-LoRA cannot perturb {problem}; remove this layer from the adapter's target_modules"
    )


@torch.no_grad()
def refresh_row_norms(layers: Iterable[PerturbedLayer]) -> None:
    """Compute `row_norms` of the layers, those of one shape together: it saves hundreds of small operations.

    Raises:
        ValueError: DoRA is active together with other adapters.
    """
    groups: dict[
        tuple[torch.Size, torch.Size, torch.device], list[tuple[PerturbedLayer, Tensor, Tensor]]
    ] = {}
    for layer in layers:
        layer.reject_mixed_dora()
        a, b = layer.low_rank()
        groups.setdefault((a.shape, b.shape, a.device), []).append((layer, a, b))
    for (_, _, device), group in groups.items():
        members = [layer for layer, _, _ in group]
        with torch.autocast(device.type, enabled=False):
            norms = merged_row_norms(
                (layer.weight.flatten(1) for layer in members),  # one dequantised weight at a time
                torch.stack([layer.weight_norms_squared() for layer in members]),
                torch.stack([a for _, a, _ in group]),
                torch.stack([b for _, _, b in group]),
            )
        for layer, row_norms in zip(members, norms, strict=True):
            layer.keep_row_norms(row_norms)
