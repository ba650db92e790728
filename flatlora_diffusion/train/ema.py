"""The exponential moving average of an adapter (EMA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class AdapterAverage:
    """The average of what is trained in some models, over the steps so far.

    After step t the average is `d * average + (1 - d) * parameters` with `d = min(decay, t / (t + 9))`; after
    the first step it is the parameters.

    Args:
        models: Whose trainable parameters are averaged.
        decay: The greatest d.
    """

    def __init__(self, models: Iterable[nn.Module], decay: float) -> None:
        self._parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        self._ema = EMAModel(self._parameters, decay=decay, foreach=True)

    def step(self) -> None:
        """Take in the parameters: once after each step."""
        self._ema.step(self._parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The models with the average inside the block; after it their own parameters, bit for bit."""
        self._ema.store(self._parameters)
        try:
            self._ema.copy_to(self._parameters)
            yield
        finally:
            self._ema.restore(self._parameters)

    def resume(self, step: int) -> None:
        """Take the models' present parameters for the average after so many steps."""
        with torch.no_grad():
            for average, parameter in zip(self._ema.shadow_params, self._parameters, strict=True):
                average.copy_(parameter)
        self._ema.optimization_step = step
