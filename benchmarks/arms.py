"""Ways to train, each at work in a process of its own: it takes a step when it is told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import SIGMA, now, process_peak
from flatlora_diffusion.config.settings import TrainConfig

# Each process imports this module: what only some of the arms need is imported where it is used.


@dataclass(frozen=True)
class Arm:
    """A way to train: the diffusers script's, with captions or one prompt, or this project's.

    Attributes:
        captions: Whether the script's images have some; None: it is this project's.
        sigma: Flat-LoRA's.
        later: An earlier run has encoded the same images and captions.
    """

    captions: bool | None = None
    sigma: float = 0.0
    later: bool = False


SCRIPT = "diffusers script, captions"
ARMS = {
    SCRIPT: Arm(captions=True),
    "diffusers script, one prompt": Arm(captions=False),
    "LoRA": Arm(),
    "Flat-LoRA": Arm(sigma=SIGMA),
    "Flat-LoRA, later run": Arm(sigma=SIGMA, later=True),
}


class StopTrainingError(Exception):
    """Leaves a training loop."""


class Steps:
    """The measured side of a connection: says that a step is done, and waits for leave to begin the next."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._began: float | None = None
        self._peak = 0

    def done(self) -> None:
        """Send the step's seconds; None of the first, which belongs to the start-up.

        Raises:
            StopTrainingError: There have been enough.
        """
        ended = now(self._device)
        self._connection.send(None if self._began is None else ended - self._began)
        if not self._connection.recv():
            raise StopTrainingError
        self._began = now(self._device)

    def peak(self) -> int:
        """Peak memory so far, in bytes; to be asked for before a trainer resets the GPU's counter."""
        self._peak = max(self._peak, process_peak())
        return self._peak


def train_here(config: TrainConfig, steps: Steps) -> None:
    """The trainer as it is, watched by a callback."""
    from flatlora_diffusion.train.arms import train
    from flatlora_diffusion.train.callbacks import Callback, TrainingRun

    class Watch(Callback):
        def on_train_begin(self, run: TrainingRun) -> None:
            steps.peak()

        def backward(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
            if run.step:  # the step before is done, with its logging
                steps.done()
            return compute()

    train(config, callbacks=[Watch()])


def work(
    name: str,
    config: TrainConfig,
    samples: Sequence[tuple[Path, str]],
    connection: Connection,
    log: Path,
    cache: Path,
) -> None:
    """Train as the named arm does until the measuring process has enough, then tell it the peak memory."""
    os.environ["FLATLORA_CACHE"] = str(cache)
    with log.open("w", encoding="utf-8") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    steps = Steps(connection)
    arm = ARMS[name]
    with contextlib.suppress(StopTrainingError):
        if arm.captions is None:
            train_here(config, steps)
        else:
            from benchmarks import reference

            reference.train(config, samples, lambda loss: steps.done(), captions=arm.captions)
    connection.send(steps.peak())


class Process:
    """An arm at work in a process of its own; made when its first step is done.

    Args:
        name: Of the arm.
        config: The settings of its run.
        samples: Images and captions, for the diffusers script.
        log: Where its output goes.
        cache: Where this project's trainer keeps what it has encoded.

    Attributes:
        start_up: Seconds from starting Python to the first step done.
    """

    def __init__(
        self, name: str, config: TrainConfig, samples: Sequence[tuple[Path, str]], log: Path, cache: Path
    ) -> None:
        self._name, self._log = name, log
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(
            target=work, args=(name, config, samples, other_end, log, cache), daemon=True
        )
        began = time.perf_counter()
        self._process.start()
        other_end.close()
        try:
            self._receive()
        except BaseException:
            self.kill()
            raise
        self.start_up = time.perf_counter() - began

    def step(self) -> float:
        """Let it take a step; its seconds."""
        self._connection.send(True)
        return self._receive()

    def stop(self) -> int:
        """End it; its peak memory in bytes."""
        self._connection.send(False)
        peak = self._receive()
        self._process.join()
        return peak

    def kill(self) -> None:
        """End it at once, if it is still there."""
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            said = (
                self._log.read_text(encoding="utf-8", errors="replace")[-2000:] if self._log.exists() else ""
            )
            raise RuntimeError(f"the arm {self._name!r} failed:\n{said}") from None
