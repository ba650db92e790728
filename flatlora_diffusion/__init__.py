"""Flat-LoRA for diffusers: LoRA training that ends in flat regions of the full weight space."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatlora_diffusion.perturb import FlatLoRA
    from flatlora_diffusion.processors import FlatLoRAAttnProcessor

__all__ = ["FlatLoRA", "FlatLoRAAttnProcessor"]
__version__ = "0.1.0"

_HOMES = {"FlatLoRA": "perturb", "FlatLoRAAttnProcessor": "processors"}


def __getattr__(name: str) -> Any:
    """Import torch and PEFT when a name is first used: command lines then answer --help at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
