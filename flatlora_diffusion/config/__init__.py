"""The settings of a training run, and the command line and YAML file that give them.

`settings` declares them, each by an `options.option`; `contradictions` says which don't go together;
`command_line` makes a parser of the declarations.
"""

from flatlora_diffusion.config.settings import TrainConfig

__all__ = ["TrainConfig"]
