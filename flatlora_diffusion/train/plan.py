"""`--dry_run`: what a run will do, and what a few of its steps took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Sample
from flatlora_diffusion.train.memory import Room
from flatlora_diffusion.train.preset import shorter_sides, step_memory_of

TRIED = 4
"""Steps that are taken; the first one, which also prepares kernels, isn't counted where there are others."""
ENCODED = 4
"""Images that are encoded for them."""


@dataclass(frozen=True)
class Trial:
    """What a few steps of a run took, and how many it will have.

    Attributes:
        config: Settings of the run.
        steps: Optimizer steps in all.
        steps_an_epoch: In a pass over the images.
        processes: That train together.
        seconds: Of each step that was taken.
        preparing: Seconds of loading the base and encoding `ENCODED` images.
        peak: GiB that this process or its GPU has held at most.
        share: Parameters of the UNet relative to SDXL's.
        room: Memory that was at hand before.
    """

    config: TrainConfig
    steps: int
    steps_an_epoch: int
    processes: int
    seconds: Sequence[float]
    preparing: float
    peak: float
    share: float
    room: Room

    @property
    def step(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds[1:] or self.seconds)


def plan(samples: Sequence[Sample], heldout: Sequence[Sample], trials: Sequence[Trial]) -> str:
    """The plan in lines.

    Args:
        samples: The training images.
        heldout: Those that are not trained.
        trials: Of each run: with `compare` there are two.
    """
    first, last = trials[0], trials[-1]
    config = first.config
    rows = [
        ("pictures", _pictures(config, samples, heldout)),
        ("steps", _steps(first)),
        *((trial.config.method, f"sigma {trial.config.flat_sigma:g}, {_took(trial)}") for trial in trials),
        ("memory", _memory(last)),
        ("time", _time(trials, bool(heldout))),
        (
            "before it",
            f"loading the base and encoding {min(ENCODED, len(samples))} of {len(samples)} pictures took "
            f"{_duration(first.preparing)}",
        ),
        ("output", f"{config.output_dir}; nothing has been written"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _pictures(config: TrainConfig, samples: Sequence[Sample], heldout: Sequence[Sample]) -> str:
    sides = shorter_sides(samples)
    size = f"{min(sides)} to {max(sides)}" if len(set(sides)) > 1 else str(sides[0])
    shown = f"{config.resolution} x {config.resolution}"
    shown = f"buckets of about {shown}" if config.aspect_buckets else shown
    kept_back = f"; {len(heldout)} held out" if heldout else ""
    return f"{len(samples)} of {size} px (shorter side), shown as {shown}{kept_back}"


def _steps(trial: Trial) -> str:
    config, processes = trial.config, trial.processes
    at_once, accumulated = config.train_batch_size, config.gradient_accumulation_steps
    where = f"{processes} processes" if processes > 1 else "1 process"
    epochs = f"{trial.steps / trial.steps_an_epoch:.1f} epochs of {trial.steps_an_epoch}"
    batch = f"{at_once * accumulated * processes} ({at_once} at once, {accumulated} accumulated, {where})"
    done = ", with those that a checkpoint has done" if config.resume_from_checkpoint else ""
    return f"{trial.steps}{done}, with a batch of {batch}: {epochs}"


def _time(trials: Sequence[Trial], heldout: bool) -> str:
    besides = [*(["held-out losses"] if heldout else []), "checkpoints"]
    besides += ["pictures"] if trials[0].config.prompts_to_draw else []
    folds = trials[0].config.folds or 0
    total = (1 + folds) * sum(trial.steps * trial.step for trial in trials)
    steps = f"{_duration(total)} of steps{', the folds among them' if folds else ''}"
    return f"about {steps}; not counted: {', '.join(besides)}"


def _took(trial: Trial) -> str:
    return f"{trial.step:.3g} s a step here, the median of {len(trial.seconds[1:] or trial.seconds)}"


def _memory(trial: Trial) -> str:
    config, room = trial.config, trial.room
    where = "GPU" if room.kind == "cuda" else "process"
    held = f"the {where} held {trial.peak:.2f} GiB at most; {room.gib:.1f} were free on {room.where}"
    sdxl = 0.9 < trial.share < 1.1
    if not sdxl or config.train_text_encoder:
        return held
    return f"{held}; computed for a step: {step_memory_of(config, trial.share):.1f}"


def _duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
