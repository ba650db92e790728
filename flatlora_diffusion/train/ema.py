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
    the first step it is the parameters. A model whose parameters are trained no further keeps its average.

    Args:
        models: Whose trainable parameters are averaged.
        decay: The greatest d.
    """

    def __init__(self, models: Iterable[nn.Module], decay: float) -> None:
        trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
        # One for each model: diffusers' would take the last values of what is frozen for their average.
        self._averages = [(EMAModel(own, decay=decay, foreach=True), own) for own in trained]

    def step(self) -> None:
        """Take in the parameters: once after each step."""
        for average, parameters in self._averages:
            if any(parameter.requires_grad for parameter in parameters):
                average.step(parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The models with the average inside the block; after it their own parameters, bit for bit."""
        for average, parameters in self._averages:
            average.store(parameters)
        try:
            for average, parameters in self._averages:
                average.copy_to(parameters)
            yield
        finally:
            for average, parameters in self._averages:
                average.restore(parameters)

    def resume(self, step: int) -> None:
        """Take the models' present parameters for the average after so many steps."""
        for average, parameters in self._averages:
            with torch.no_grad():
                for shadow, parameter in zip(average.shadow_params, parameters, strict=True):
                    shadow.copy_(parameter)
            average.optimization_step = step
