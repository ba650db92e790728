"""The trainer: one run, or LoRA and Flat-LoRA for a comparison, and what follows.

The wing has the name of the function that it offers, and Python binds a subpackage to its name in the
package whenever something inside it is imported. So the module can be called, whatever was imported before:
`flatlora_diffusion.train(config)` trains.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatlora_diffusion.config.settings import TrainConfig
    from flatlora_diffusion.train.callbacks import Callback


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> None:
    """Train as configured: see `flatlora_diffusion.train.arms.train`, which a first call imports."""
    from flatlora_diffusion.train.arms import train

    train(config, callbacks)


class _Trainer(ModuleType):
    def __call__(self, config: TrainConfig, callbacks: Sequence[Callback] = ()) -> None:
        train(config, callbacks)


sys.modules[__name__].__class__ = _Trainer
