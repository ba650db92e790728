"""`--dry_run`: what a run will do, and what a few of its steps took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Sample
from flatlora_diffusion.train.memory import Room
from flatlora_diffusion.train.preset import shorter_sides, step_memory_of
from flatlora_diffusion.train.tried import Tried

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
        tried: Seconds of what was tried, and the size of a checkpoint.
        peak: GiB that this process or its GPU has held at most.
        share: Parameters of the UNet relative to SDXL's.
        room: Memory that was at hand before.
    """

    config: TrainConfig
    steps: int
    steps_an_epoch: int
    processes: int
    tried: Tried
    peak: float
    share: float
    room: Room

    @property
    def counted(self) -> Sequence[float]:
        """Seconds of the steps that count."""
        return self.tried.seconds[1:] or self.tried.seconds

    @property
    def step(self) -> float:
        """Seconds a step."""
        return statistics.median(self.counted)

    @property
    def runs(self) -> int:
        """The run itself and its folds."""
        return 1 + (self.config.folds or 0)

    @property
    def measurements(self) -> int:
        """How often the loss of each held-out image is measured; folds hold out each image once."""
        both = 2 if self.config.folds and self.config.use_ema else 1  # the average, and the adapter itself
        return both * math.ceil(self.steps / self.config.heldout_steps)

    @property
    def validations(self) -> int:
        """How often the validation prompts are drawn before the end; see `Validation.is_due`."""
        every = self.config.validation_epochs
        if not every or not self.config.prompts_to_draw:
            return 0
        return math.ceil(self.steps // self.steps_an_epoch / every)


def plan(
    config: TrainConfig,
    samples: Sequence[Sample],
    heldout: Sequence[Sample],
    trials: Sequence[Trial],
    prompts: int,
    class_images: int = 0,
) -> str:
    """The plan in lines.

    Args:
        config: The settings.
        samples: The training images.
        heldout: Those that are not trained.
        trials: Of each run: with `compare` there are two.
        prompts: How many are drawn after training.
        class_images: How many are drawn before it.
    """
    first, last = trials[0], trials[-1]
    rows = [
        ("pictures", _pictures(config, samples, heldout)),
        ("steps", _steps(first)),
        *([("folds", _folds(config.folds, first.steps, len(samples)))] if config.folds else []),
        *((trial.config.method, f"sigma {trial.config.flat_sigma:g}, {_took(trial)}") for trial in trials),
        ("memory", _memory(last)),
        ("time", _time(trials, len(samples) if config.folds else len(heldout), prompts)),
        *([("class", f"{class_images} images are drawn first; not counted")] if class_images else []),
        ("before it", _before(first, len(samples))),
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


def _folds(folds: int, steps: int, images: int) -> str:
    parts = sorted({images // folds, math.ceil(images / folds)})
    without = " or ".join(map(str, parts))
    return (
        f"{folds} runs of {steps} steps, each without {without} of the pictures; then one with all of them, "
        "for as many steps as these find best"
    )


def _time(trials: Sequence[Trial], heldout: int, prompts: int) -> str:
    """The whole, its parts, and what isn't counted.

    Args:
        trials: Of each run.
        heldout: Images that are held out, by folds in turn.
        prompts: How many are drawn after training.
    """
    last = trials[-1]
    config, tried = last.config, last.tried
    runs = sum(trial.runs for trial in trials)
    name = "steps, those of folds among them" if config.folds else "steps"
    parts = {name: sum(trial.runs * trial.steps * trial.step for trial in trials)}
    missing = []
    if heldout and tried.heldout is not None:
        parts["held-out losses"] = tried.heldout * heldout * sum(trial.measurements for trial in trials)
    elif heldout:
        missing.append("held-out losses")
    if prompts and tried.picture is not None:
        beside, a_step = tried.picture
        during, after = _drawn(trials, prompts)
        parts[f"{during + after} pictures"] = (during + after) * beside + a_step * (
            during * config.validation_inference_steps + after * config.final_steps
        )
    elif prompts:
        missing.append("pictures")
    parts[f"loading the base{f' {runs} times' if runs > 1 else ''}"] = runs * trials[0].tried.preparing
    if checkpoints := sum(trial.runs * (trial.steps // config.checkpointing_steps) for trial in trials):
        missing.append(
            f"writing {checkpoints} checkpoint{'s' * (checkpoints > 1)} of {_size(tried.checkpoint)}"
        )
    most = "at most about" if config.folds or config.stop_when_worse else "about"
    told = ", ".join(f"{_duration(seconds)} of {what}" for what, seconds in parts.items())
    uncounted = f"; not counted: {', '.join(missing)}" if missing else ""
    return f"{most} {_duration(sum(parts.values()))}: {told}{uncounted}"


def _drawn(trials: Sequence[Trial], prompts: int) -> tuple[int, int]:
    """How many pictures are drawn during and after training: of each method, and of the base beside them."""
    each = prompts * trials[0].config.num_validation_images
    compared = len(trials) > 1
    validations = [trial.validations for trial in trials]
    return each * (sum(validations) + (compared and validations[0] > 0)), each * (1 + len(trials))


def _before(trial: Trial, images: int) -> str:
    encoded = min(ENCODED, images)
    rest = f"; encoding the other {images - encoded} is not counted" if images > encoded else ""
    took = _duration(trial.tried.preparing)
    return f"loading the base and encoding {encoded} of {images} pictures took {took}{rest}"


def _took(trial: Trial) -> str:
    return f"{trial.step:.3g} s a step here, the median of {len(trial.counted)}"


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


def _size(count: int) -> str:
    """Bytes, such as 3.4 MB."""
    return f"{count / 1e6:.2g} MB" if count < 1e7 else f"{count / 1e6:.0f} MB"
