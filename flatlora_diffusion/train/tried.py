"""What `--dry_run` measures besides training steps: held-out losses, pictures, the size of a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flatlora_diffusion.common.devices import if_memory_lasts
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output.checkpoint import Checkpoint

_FEW, _MORE = 2, 4  # denoising steps of the pictures that are timed


@dataclass(frozen=True)
class Tried:
    """What was measured of a run that was thrown away.

    Attributes:
        preparing: Seconds of loading the base and encoding the first images.
        seconds: Of each step that was taken.
        heldout: Seconds that the loss of a held-out image takes; None where none is held out, or the memory
            ran out.
        picture: Seconds of a picture besides denoising, and of each of its denoising steps; None where none
            is drawn, or the memory ran out.
        checkpoint: Its bytes.
    """

    preparing: float
    seconds: Sequence[float]
    heldout: float | None
    picture: tuple[float, float] | None
    checkpoint: int


def time_heldout(measure: Callable[[], float]) -> float | None:
    """Seconds that measuring the held-out loss takes; None where the memory runs out."""

    def measured() -> float:
        return min(_seconds(measure) for _ in range(2))  # the first one prepares kernels

    return if_memory_lasts(measured, lambda: None, "while the held-out loss was measured: it isn't timed")


def time_picture(draw: Callable[[TrainConfig], Any], config: TrainConfig) -> tuple[float, float] | None:
    """Seconds of a validation picture besides denoising, and of each of its denoising steps.

    A picture takes `a + b * steps`; pictures of few steps tell a and b.

    Args:
        draw: Draws the validation pictures of such settings; None where the memory ran out.
        config: Settings of the run.
    """
    drawn: list[Any] = []

    def seconds_of(steps: int) -> float:
        one = {"validation_prompt": config.prompts_to_draw[:1], "num_validation_images": 1}
        own = dataclasses.replace(config, validation_inference_steps=steps, **one)
        return _seconds(lambda: drawn.append(draw(own)))

    seconds_of(_FEW)  # prepares kernels
    few, more = seconds_of(_FEW), seconds_of(_MORE)
    if None in drawn:
        return None
    a_step = max(0.0, (more - few) / (_MORE - _FEW))
    return max(0.0, few - _FEW * a_step), a_step


def size_of(checkpoint: Checkpoint) -> int:
    """The bytes of its adapter, its optimizer's state and the files beside them."""
    tensors = sum(tensor.nbytes for tensor in checkpoint.optimizer.values())
    return len(checkpoint.adapter) + tensors + sum(map(len, checkpoint.others.values()))


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
