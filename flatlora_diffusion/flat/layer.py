"""One LoRA layer of PEFT under noise: what its merged weight is, and a forward pass with `W + eps`.

The base weight is never written. While a layer is perturbed, its `forward` is replaced by one that computes
with a transient `W + eps`; the backward pass builds the sum again from the noise's draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.flat.branch import Branch, branch_of
from flatlora_diffusion.flat.fused import FusedConvolution, FusedLinear, compute_dtype
from flatlora_diffusion.flat.noise import Draw
from flatlora_diffusion.flat.noisy_base import Base, NoisyBase
from flatlora_diffusion.flat.quantized import QuantizedWeight, is_of_bitsandbytes
from flatlora_diffusion.flat.row_norms import row_norms_squared
from flatlora_diffusion.flat.supported import supported_base

Place = tuple[dict[str, Any], str, Any]
"""A dictionary of a module, a key, and what was found there."""


@dataclass(slots=True)
class Contents:
    """All that the merged weight depends on.

    Attributes:
        active: The layer's active adapters, or none where they are disabled or merged.
        names: Those of them that the forward pass adds to the base weight.
        scalings: Their factors.
        factors: The weights A of each, then B of each, and for AdaLoRA E.
        tensors: The factors and the base weight.
        places: Where modules keep these and each other.
        versions: Those of the tensors.
    """

    active: list[str]
    names: list[str]
    scalings: list[float]
    factors: list[Tensor]
    tensors: list[Tensor]
    places: list[Place]
    versions: list[tuple[object, ...]]

    def is_all_of(self, layer: LoraLayer) -> bool:
        """Whether a layer is still made of these parts, whatever was written into them."""
        if self.active != _active(layer):
            return False
        for name, scaling in zip(self.names, self.scalings, strict=True):
            if layer.scaling[name] != scaling:  # pyright: ignore[reportUnknownMemberType]
                return False
        return all(place.get(key) is part for place, key, part in self.places)

    def with_versions(self, versions: list[tuple[object, ...]]) -> Contents:
        """The same parts, after something was written into them."""
        return Contents(
            self.active, self.names, self.scalings, self.factors, self.tensors, self.places, versions
        )


@dataclass(slots=True)
class Prepared:
    """What a layer needs for the forward passes of one step.

    Attributes:
        moment: The step for which it holds, as an object: each change of the clock makes another.
        contents: What the merged weight was made of.
        row_norms: Norm of each row of `W + sum_k s_k B_k A_k`, before any rescaling by DoRA: (m,), float32.
        draw: The noise on the base weight.
        branch: The low-rank branch, where the fused operation knows all of the layer.
    """

    moment: object
    contents: Contents
    row_norms: Tensor
    draw: Draw
    branch: Branch | None


def _version(tensor: Tensor) -> tuple[object, ...]:
    """Changes whenever the tensor is written in place, replaced, cast or moved."""
    return tensor.data_ptr(), tensor._version, tensor.dtype


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
        self.base: Base = supported_base(name, layer)
        self._quantized = QuantizedWeight(self.base) if is_of_bitsandbytes(self.base) else None
        self._groups: list[nn.ModuleDict | nn.ParameterDict] = [layer.lora_A, layer.lora_B]
        if isinstance(layer, SVDLinear):
            self._groups.append(layer.lora_E)
        # The layer's own `forward`, where the noise hangs on the layer itself.
        self.host_forward: Callable[..., Tensor] | None = None
        self._noisy_base = NoisyBase(self.base, self._quantized)
        self._weight_norms: tuple[tuple[object, ...], Tensor] | None = None
        self._contents: Contents | None = None
        self._prepared: Prepared | None = None
        self._replaced: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
        self._dora_hooks: list[RemovableHandle] = []

    @property
    def weight(self) -> Tensor:
        """The frozen base weight W, (m, n) or (m, in, *kernel); where it is quantised, a new tensor."""
        return self._noisy_base.weight_in(self.base.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Filters m, and inputs n of each: a convolution counts as (m, in * kernel)."""
        shape = (self._quantized or self.base.weight).shape
        return shape[0], shape[1:].numel()

    @property
    def module(self) -> nn.Module:
        """The layer as a module: PEFT's `LoraLayer` is a mixin."""
        assert isinstance(self.layer, nn.Module)
        return self.layer

    @property
    def training(self) -> bool:
        """Whether the layer is in `train()` mode."""
        return self.module.training

    def contents(self) -> Contents:
        """What the merged weight is made of just now: no adapter where they are disabled or merged.

        Asked at every pass, and so quick where only values have changed; where nothing has, it is the very
        object of the last time.
        """
        contents = self._contents
        if contents is None or not contents.is_all_of(self.layer):
            contents = self._contents = self._read_contents()
        elif (versions := [_version(tensor) for tensor in contents.tensors]) != contents.versions:
            contents = self._contents = contents.with_versions(versions)
        return contents

    def _read_contents(self) -> Contents:
        active = [*_active(self.layer)]  # not the layer's own list, which somebody may change
        names = [name for name in active if name in self._groups[0]]
        scalings: list[float] = [self.layer.scaling[name] for name in names]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        factors: list[Tensor] = []
        base = self.base
        places: list[Place] = [(base._parameters, "weight", base.weight)]  # pyright: ignore[reportPrivateUsage]
        for group in self._groups:
            for name in names:
                found = _places(group, name)
                places += found
                factors.append(found[-1][-1])
        tensors = [*factors, base.weight]
        versions = [_version(tensor) for tensor in tensors]
        return Contents(active, names, scalings, factors, tensors, places, versions)

    @property
    def noise_dtype(self) -> torch.dtype:
        """The dtype in which `W + eps` is formed."""
        return (self._quantized or self.base.weight).dtype

    def is_prepared(self, moment: object, contents: Contents) -> bool:
        """Whether what was prepared is of this step and of those contents."""
        prepared = self._prepared
        return prepared is not None and prepared.moment is moment and prepared.contents is contents

    def prepare(self, moment: object, contents: Contents, row_norms: Tensor, draw: Draw) -> None:
        """Take over what `prepare.prepare` computed for this step."""
        self._prepared = Prepared(moment, contents, row_norms, draw, self._branch(contents))

    @property
    def prepared(self) -> Prepared:
        """Row norms and noise of the step; `prepare` comes first."""
        assert self._prepared is not None
        return self._prepared

    def dora_scale(self) -> Tensor | None:
        """DoRA's factor `magnitude / ||W'_i||` on each row of the merged weight: (m,), float32; else None."""
        for name in self.prepared.contents.names:
            if name in self.layer.lora_magnitude_vector:
                magnitude = weight_of(self.layer.lora_magnitude_vector[name]).detach()
                return magnitude.float().flatten() / self.prepared.row_norms
        return None

    def perturb(self) -> None:
        """Compute with the prepared noise until `restore` is called."""
        if self.prepared.branch is not None:
            self._replace(self.module, self._fused_forward)
            return
        self._replace(self.base, self._base_forward)
        # DoRA with dropout multiplies by the base weight itself instead of calling the base layer.
        for vector in self.layer.lora_magnitude_vector.values():
            self._dora_hooks.append(vector.register_forward_pre_hook(_use_base_layer, with_kwargs=True))

    def restore(self) -> None:
        """Undo `perturb`; does nothing where there is nothing to undo."""
        while self._replaced:
            self._put_back()
        while self._dora_hooks:
            self._dora_hooks.pop().remove()

    def _put_back(self) -> None:
        module, forward = self._replaced.pop()
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = forward

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        # An attribute of the instance shadows the method; somebody else's may be there already. Past
        # `nn.Module.__setattr__`, which looks through all of the module's tensors first.
        self._replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def _base_forward(self, input: Tensor) -> Tensor:
        return self._noisy_base(input, self.prepared.draw)

    def _fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        prepared = self.prepared
        branch, weight, bias = prepared.branch, self.base.weight, self.base.bias
        dtype = None
        if branch is not None and not args and not kwargs and branch.is_passable():
            dtype = compute_dtype(x, weight, branch.a, branch.b)
        if branch is None or dtype is None:
            # The reference path: PEFT's own layer, whose base layer is perturbed.
            self._replace(self.base, self._base_forward)
            try:
                return type(self.module).forward(self.module, x, *args, **kwargs)
            finally:
                self._put_back()
        common = x, weight, bias, branch.a, branch.b, branch.scaling, prepared.draw, dtype
        if branch.geometry is None:
            return FusedLinear.apply(*common)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return FusedConvolution.apply(*common, branch.geometry)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def _branch(self, contents: Contents) -> Branch | None:
        """The low-rank branch, where it is one that the fused operation computes as PEFT's layer does."""
        if len(contents.names) != 1 or self._quantized is not None:
            return None
        if self.module.__dict__.get("forward") is not self.host_forward:
            return None  # somebody else's
        (name,), (scaling,), last = contents.names, contents.scalings, self._prepared
        if last is not None and last.contents.places is contents.places:  # of the same parts
            known = last.branch
            if known is not None and known.is_plain_in(self.layer, name):
                return known
        return branch_of(self.layer, name, scaling)

    def weight_norms_squared(self) -> Tensor:
        """Squared norm of each row of the base weight: (m,), float32; computed once."""
        version = _version(self.base.weight)
        if self._weight_norms is None or self._weight_norms[0] != version:
            self._weight_norms = version, row_norms_squared(self.weight.detach().flatten(1))
        return self._weight_norms[1]

    def low_rank(self, contents: Contents) -> tuple[Tensor, Tensor, float]:
        """A (r, n), B (m, r) and a factor s with `dW = s * B @ A`, over all active adapters.

        A single plain adapter's factors are those of the layer: in its dtype, and for a convolution with its
        kernel.

        Raises:
            ValueError: DoRA is active together with other adapters: there is no single merged weight.
        """
        count = len(contents.names)
        if count == 1 and not isinstance(self.layer, SVDLinear):
            a, b = contents.factors
            return a, b, contents.scalings[0]
        pairs: list[tuple[Tensor, Tensor, float]] = []
        for index, (name, scaling) in enumerate(zip(contents.names, contents.scalings, strict=True)):
            a, b = contents.factors[index], contents.factors[count + index]
            if isinstance(self.layer, SVDLinear):  # dW = B @ (A * E) * scaling / ranknum, as PEFT computes it
                a, b = a * self.layer.lora_E[name], b / (self.layer.ranknum[name] + 1e-5)
            elif a.dim() > 2:
                a, b = a.flatten(1), b.flatten(1)
            pairs.append((a.float(), b.float(), scaling))
        if count == 1:
            return pairs[0]
        if any(name in self.layer.lora_magnitude_vector for name in contents.names):
            raise ValueError(
                f"{self.name}: DoRA together with other active adapters ({', '.join(contents.names)}) has no "
                "single merged weight; activate one adapter"
            )
        m, n = self.shape
        none = torch.empty(0, device=self.base.weight.device)  # there may be no active adapter
        return (
            torch.cat([none.view(0, n), *(a for a, _, _ in pairs)]),
            torch.cat([none.view(m, 0), *(b * scaling for _, b, scaling in pairs)], dim=1),
            1.0,
        )


def _active(layer: LoraLayer) -> list[str]:
    """The adapters that count: none where they are disabled, or in the base weight already."""
    return [] if layer.disable_adapters or layer.merged else layer.active_adapters


def _places(group: nn.ModuleDict | nn.ParameterDict, name: str) -> list[Place]:
    """Where A or B of an adapter is, last the tensor: PEFT keeps a layer with it, for AdaLoRA only itself."""
    entry = group[name]
    if isinstance(entry, Tensor):
        return [(group._parameters, name, entry)]  # pyright: ignore[reportPrivateUsage]
    # A module's attributes are ten times slower to read than the dictionaries that they are in.
    kept = entry._parameters  # pyright: ignore[reportPrivateUsage]
    return [(group._modules, name, entry), (kept, "weight", weight_of(entry))]  # pyright: ignore[reportPrivateUsage]
