"""Flat-LoRA for diffusers: LoRA training that ends in flat regions of the full weight space.

The public names are imported when first used, so that command lines answer `--help` at once.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatlora_diffusion.config.settings import TrainConfig
    from flatlora_diffusion.flat.flat_lora import FlatLoRA
    from flatlora_diffusion.flat.hooks import FlatLoRAAttnProcessor
    from flatlora_diffusion.grid.draw import draw_cells, draw_grid
    from flatlora_diffusion.train.arms import train

__all__ = ["FlatLoRA", "FlatLoRAAttnProcessor", "TrainConfig", "draw_cells", "draw_grid", "train"]
__version__ = version("flatlora_diffusion")

_HOMES = {
    "FlatLoRA": "flat.flat_lora",
    "FlatLoRAAttnProcessor": "flat.hooks",
    "TrainConfig": "config.settings",
    "draw_cells": "grid.draw",
    "draw_grid": "grid.draw",
    "train": "train",  # the wing itself can be called: an import of it takes this name
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return module if name == "train" else getattr(module, name)
