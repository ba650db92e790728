"""Flat-LoRA for diffusers: LoRA training that ends in flat regions of the full weight space."""

from flatlora_diffusion.perturb import FlatLoRA
from flatlora_diffusion.processors import FlatLoRAAttnProcessor

__all__ = ["FlatLoRA", "FlatLoRAAttnProcessor"]
__version__ = "0.1.0"
