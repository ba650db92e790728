"""Where the noise hangs: attention processors of diffusers, attention modules of transformers, layers.

Each place brackets a forward pass with `switch.on(layers)` and `switch.off(layers)`; what happens in between
is the same everywhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

from torch import nn

from flatlora_diffusion.flat.layer import PerturbedLayer

Detach = Callable[[], None]

_WRAPPED_MODULE = "flat_lora_wrapped_processor"
_ATTACHED_ALREADY = "this model already has Flat-LoRA attached; call .remove() on the earlier FlatLoRA first"


class Switch(Protocol):
    """Turns the noise of some layers on and off around a forward pass."""

    def on(self, layers: Sequence[PerturbedLayer]) -> None:
        """Perturb those of the layers that are in training; if this raises, none of them is perturbed."""

    def off(self, layers: Sequence[PerturbedLayer]) -> None:
        """Restore all of the layers."""


class DiffusersAttention(Protocol):
    """An attention block of diffusers, as far as it is used here."""

    processor: Any

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """That of `nn.Module`."""


class FlatLoRAAttnProcessor:
    """Runs another attention processor with the block's LoRA projections perturbed.

    Args:
        processor: The processor that does the attention, of any kind.
        layers: The LoRA layers inside the attention block: to_q, to_k, to_v, to_out.0 where they are adapted.
        switch: Turns their noise on and off.
    """

    def __init__(self, processor: Any, layers: Sequence[PerturbedLayer], switch: Switch) -> None:
        self.processor = processor

        @functools.wraps(processor.__call__)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch.on(layers)
            try:
                return processor(*args, **kwargs)
            finally:
                switch.off(layers)

        # Diffusers asks for it at every call (see below), and looking through wrappers takes its time.
        call.__dict__["__signature__"] = inspect.signature(processor.__call__)
        self._call = call

    @property
    def __call__(self) -> Callable[..., Any]:
        """The call, under the signature of the wrapped processor.

        `Attention.forward` of diffusers reads that signature to decide which keyword arguments it passes on;
        a plain `*args, **kwargs` here would silently lose them.
        """
        return self._call


class _NoisyLayer:
    """The `forward` of a LoRA layer outside of any attention block, perturbed while it runs.

    A pre-hook would come too late: a module looks its `forward` up before it calls its hooks.
    """

    def __init__(self, layer: PerturbedLayer, switch: Switch) -> None:
        self._layers, self._switch = (layer,), switch
        self._module = layer.module
        self._original: Callable[..., Any] = self._module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._switch.on(self._layers)
        try:
            forward = self._module.forward
            return (self._original if forward is self else forward)(*args, **kwargs)
        finally:
            self._switch.off(self._layers)


class _TurnOn:
    """A forward pre-hook; a class of its own so that a second attachment is recognised."""

    def __init__(self, layers: Sequence[PerturbedLayer], switch: Switch) -> None:
        self._layers, self._switch = layers, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._switch.on(self._layers)


def attach_to_attention(
    attention: DiffusersAttention, layers: Sequence[PerturbedLayer], switch: Switch
) -> Detach:
    """Wrap the processor of a diffusers attention block; the result puts the original object back.

    Raises:
        ValueError: The block is wrapped already.
    """
    original = attention.processor
    if isinstance(original, FlatLoRAAttnProcessor):
        raise ValueError(_ATTACHED_ALREADY)
    is_module = isinstance(original, nn.Module)
    wrapper = FlatLoRAAttnProcessor(original, layers, switch)
    if is_module:
        # Its weights (IP-Adapter's, say) must stay where .parameters() and .to() find them.
        del attention.processor
        attention.add_module(_WRAPPED_MODULE, original)
    attention.processor = wrapper

    def detach() -> None:
        if is_module:
            delattr(attention, _WRAPPED_MODULE)
        if attention.processor is wrapper:  # else somebody has set another one since: it is theirs now
            del attention.processor
            attention.processor = original

    return detach


def attach_to_layer(layer: PerturbedLayer, switch: Switch) -> Detach:
    """Perturb a LoRA layer while it runs.

    Raises:
        ValueError: It is attached to already.
    """
    module = layer.module
    original = module.__dict__.get("forward")
    if isinstance(original, _NoisyLayer):
        raise ValueError(_ATTACHED_ALREADY)
    layer.host_forward = module.__dict__["forward"] = _NoisyLayer(layer, switch)

    def detach() -> None:
        if original is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = original

    return detach


def attach_to_module(module: nn.Module, layers: Sequence[PerturbedLayer], switch: Switch) -> Detach:
    """Perturb the layers while `module`, an attention module of transformers, runs.

    Raises:
        ValueError: The module has such hooks already.
    """
    if any(isinstance(hook, _TurnOn) for hook in module._forward_pre_hooks.values()):  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]
        raise ValueError(_ATTACHED_ALREADY)

    def turn_off(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        switch.off(layers)

    # always_call: an exception inside the forward pass must not leave the layers perturbed.
    handles = [
        module.register_forward_pre_hook(_TurnOn(layers, switch)),
        module.register_forward_hook(turn_off, always_call=True),
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def is_diffusers_attention(module: nn.Module) -> TypeGuard[DiffusersAttention]:
    """Whether the module computes its attention through an exchangeable processor."""
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an attention block of transformers, by that library's naming convention."""
    return type(module).__name__.endswith("Attention")
