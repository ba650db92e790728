"""The settings of a training run, and the command line and YAML file that give them."""

from flatlora_diffusion.config.settings import TrainConfig

__all__ = ["TrainConfig"]
