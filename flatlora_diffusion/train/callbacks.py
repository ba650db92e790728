"""Callbacks: code of others that a run calls, to watch it or to train in another way.

`train(config, callbacks=[...])` calls them in the order of the list. In one run:

    on_train_begin                  the models are ready, and what a checkpoint holds has been loaded
    for every optimizer step:
        backward                    once; leaves the step's gradients
            loss                    once for every micro-batch; what the gradients are of
        on_step_end                 after the update, before anything is measured, saved or drawn
        on_checkpoint               where a checkpoint was written
    on_train_end                    after the last step, before the adapter is saved

`compare` trains two runs, LoRA and then Flat-LoRA, with the same callbacks: `TrainingRun.method` tells which
one calls. With `folds` every fold calls them too: `TrainingRun.output` is its own folder, and the run on all
images may end before `total_steps`. A run that was complete already calls nothing. One that goes on from a
checkpoint begins with `on_train_begin`, at the checkpoint's step: nothing of a callback is saved, so one that
has a state of its own writes it beside the checkpoints, and the callbacks must be given again. One that a
signal or an error ends never comes to `on_train_end`; a signal's last checkpoint calls `on_checkpoint`.

With several processes each has its own callbacks and calls all their methods; only the main one writes files
(`run.accelerator.is_main_process`). Gradients have been averaged over the processes when `backward`'s
`compute` returns; the losses are those of a process's own samples.

What a callback raises ends the run, like any error: models and signals are left as they were before, and no
checkpoint is written. A `UserError` is what the command lines show in one line. The methods shall leave the
global random numbers alone, or the run's own may be others than those of the same run without callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.flat.flat_lora import FlatLoRA


@dataclass
class TrainingRun:
    """What callbacks see of a run: one object, kept up to date.

    Attributes:
        config: Its settings; with `compare` those of this arm.
        method: "LoRA" or "Flat-LoRA".
        output: The folder of its results. `output / f"checkpoint-{step}"` is a checkpoint.
        accelerator: Device, precision, processes; `accelerator.log(values, step=step)` for the tracker.
        models: `unet`, and `text_encoder` and `text_encoder_2` where they are trained: models with adapters.
        flat: The noise. `flat.paused()` gives the models without it.
        optimizer: Of everything that is trained, the embeddings of new tokens included.
        total_steps: Optimizer steps in all.
        step: Optimizer steps done. In `backward` and `loss`, so, that of the step in progress, from 0.
        loss: The mean loss of the last step's samples, of all processes; None before the first one.
        sigma: Of the noise in the last step; None before the first one.
    """

    config: TrainConfig
    method: str
    output: Path
    accelerator: Accelerator
    models: dict[str, nn.Module]
    flat: FlatLoRA
    optimizer: torch.optim.Optimizer
    total_steps: int
    step: int = 0
    loss: float | None = None
    sigma: float | None = None


class Callback:
    """Derive from it and define what is needed: every method here changes nothing.

    `loss` and `backward` replace what the trainer does. Each of them can be defined by one callback of a run.
    """

    def on_train_begin(self, run: TrainingRun) -> None:
        """Before the first step. `run.step` is not 0 where the run goes on from a checkpoint."""

    def on_step_end(self, run: TrainingRun) -> None:
        """After the update of a step; the step, loss and sigma of `run` are its own."""

    def on_checkpoint(self, run: TrainingRun) -> None:
        """After the checkpoint of `run.step` was written."""

    def on_train_end(self, run: TrainingRun) -> None:
        """After the last step. What is changed in the adapters here is saved."""

    def loss(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        """The loss of a micro-batch that the step descends: `compute()`, or something else.

        Args:
            run: The run.
            compute: Gives the trainer's own loss with the models as they are, a scalar with its graph; each
                call of one micro-batch has the same samples, timesteps and noise.

        Returns:
            A scalar with its graph. It is logged as the step's loss, and means over micro-batches and
            processes are taken of it.
        """
        return compute()

    def backward(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        """Leave a step's gradients in the parameters; the trainer then clips them and updates.

        Args:
            run: The run.
            compute: Runs forward and backward over the step's micro-batches with the models as they are.
                It adds to the gradients that are there (which are none at first), and gives the mean loss of
                this process's samples, a scalar. Each call has the same samples, timesteps and noise. With
                fp16 the gradients are scaled.

        Returns:
            The loss to be logged, a scalar. One that isn't finite ends the run.
        """
        return compute()


class Callbacks(Callback):
    """Several callbacks as one.

    Args:
        callbacks: In the order in which they are called.

    Raises:
        TypeError: One of them isn't a `Callback`.
        ValueError: Two of them define `loss`, or two `backward`.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"{callback!r} is no callback; give objects of classes derived from Callback")
        self._callbacks = tuple(callbacks)
        self._loss = self._only_one("loss").loss
        self._backward = self._only_one("backward").backward

    def on_train_begin(self, run: TrainingRun) -> None:
        """See `Callback.on_train_begin`."""
        for callback in self._callbacks:
            callback.on_train_begin(run)

    def on_step_end(self, run: TrainingRun) -> None:
        """See `Callback.on_step_end`."""
        for callback in self._callbacks:
            callback.on_step_end(run)

    def on_checkpoint(self, run: TrainingRun) -> None:
        """See `Callback.on_checkpoint`."""
        for callback in self._callbacks:
            callback.on_checkpoint(run)

    def on_train_end(self, run: TrainingRun) -> None:
        """See `Callback.on_train_end`."""
        for callback in self._callbacks:
            callback.on_train_end(run)

    def loss(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        """See `Callback.loss`."""
        return self._loss(run, compute)

    def backward(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        """See `Callback.backward`."""
        return self._backward(run, compute)

    def _only_one(self, method: str) -> Callback:
        """The callback that defines a method of which a run can have one, or one that doesn't."""
        own = [c for c in self._callbacks if getattr(type(c), method) is not getattr(Callback, method)]
        if len(own) > 1:
            names = " and ".join(type(callback).__name__ for callback in own)
            raise ValueError(f"{names} define `{method}`: a run can have only one such callback")
        return own[0] if own else Callback()
