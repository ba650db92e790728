"""The trainer: one run, or LoRA and Flat-LoRA for a comparison, and what follows.

The wing has the name of the function that it offers, and Python binds a subpackage to its name in the
package whenever something inside it is imported. So the module can be called, whatever was imported before:
`flatlora_diffusion.train(config)` trains.
"""

import sys
from types import ModuleType
from typing import Any


class _Trainer(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> None:
        """Train: see `flatlora_diffusion.train.arms.train`."""
        from flatlora_diffusion.train.arms import train

        train(*arguments, **named)


sys.modules[__name__].__class__ = _Trainer
