"""How a picture was made: `flatlora_diffusion.stamp.read(path)` gives back what stands inside a PNG."""

from flatlora_diffusion.draw.stamp import Stamp, read

__all__ = ["Stamp", "read"]
