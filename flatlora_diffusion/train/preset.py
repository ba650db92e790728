"""`--preset icons`: settings for a handful of icons, chosen by the pictures and the memory at hand.

What is chosen is what docs/RESULTS.md shows to work. It goes into a YAML file in the output folder, beside
the settings that were given, so that the file alone repeats the run (`--config`) and can be edited.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate.state import PartialState

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.config.command_line import read_config_file
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Sample
from flatlora_diffusion.draw.pipeline import native_side_of
from flatlora_diffusion.output.names import PRESET
from flatlora_diffusion.sdxl.base import BASE_FLAG
from flatlora_diffusion.sdxl.size import SDXL_PARAMETERS, unet_parameters
from flatlora_diffusion.train.callbacks import Callback, TrainingRun
from flatlora_diffusion.train.memory import Room, room_on, step_memory
from flatlora_diffusion.train.processes import from_main

logger = logging.getLogger(__name__)

# docs/RESULTS.md: 500 steps of batch 1 over 23 icons; three times as many were worse on icons not trained.
PASSES = 500 / 23
FEWEST, MOST = 250, 1500
EMA_DECAY = 0.99
SMALL = 0.1  # of SDXL's parameters: a base like the demo's, which was trained ten times as fast

_SEAL = "# sha256 {}: once the lines above are changed, this file is not written again.\n"
_UNWRITTEN = {"resume_from_checkpoint"}  # of one start, not of the run


@dataclass(frozen=True)
class Choice:
    """A setting that the preset chose, and why."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Surroundings:
    """What the choice depends on, besides the settings that were given.

    Attributes:
        pictures: How many an epoch has.
        sides: The shorter side of each in pixels.
        native: Side of the pictures that the base was made for.
        share: Parameters of its UNet relative to SDXL's.
        room: Memory at hand.
        processes: That train together.
    """

    pictures: int
    sides: Sequence[int]
    native: int
    share: float
    room: Room
    processes: int = 1


def choose(config: TrainConfig, given: Collection[str], around: Surroundings) -> list[Choice]:
    """What the preset chooses.

    Args:
        config: The settings that were given, with the defaults of the others.
        given: The names of those that were; they stay, and the others are chosen to go with them.
        around: Pictures, base and memory.
    """
    choices = [*_precision(config, given, around.room)]
    config = _with(config, choices)
    batch, steps = _amount(config, given, around)
    fitting = _fitting(config, given, around, batch)
    return [*fitting, *steps, *_rate(config, given, around.share), *_average(config, given), *choices]


def _with(config: TrainConfig, choices: Sequence[Choice]) -> TrainConfig:
    return dataclasses.replace(config, **{choice.name: choice.value for choice in choices})


def _precision(config: TrainConfig, given: Collection[str], room: Room) -> list[Choice]:
    if "mixed_precision" in given:
        return []
    if (launched := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) in ("fp16", "bf16"):
        return [Choice("mixed_precision", launched, "the launcher's")]
    if room.kind == "cuda":
        half = "bf16" if room.bf16 else "fp16"
        why = "half the memory of float32; the adapter itself stays in float32"
        return [Choice("mixed_precision", half, why if room.bf16 else f"{why} (the card has no bf16)")]
    return [Choice("mixed_precision", "no", "float32, the only precision that is fast without a CUDA card")]


def _amount(config: TrainConfig, given: Collection[str], around: Surroundings) -> tuple[int, list[Choice]]:
    """Images a step, all devices and micro-batches together, and how many steps."""
    names = {"train_batch_size", "gradient_accumulation_steps"} & set(given)
    own = [getattr(config, name) for name in names]
    if own:
        a_step = math.prod(own) * around.processes
    else:
        batch = next((size for size in (1, 2, 4) if PASSES * around.pictures / size <= MOST), 4)
        a_step = max(batch, around.processes)
    if {"max_train_steps", "num_train_epochs"} & set(given):
        return a_step, []
    wanted = math.ceil(round(PASSES * around.pictures / a_step, 6))
    steps = min(max(wanted, FEWEST), MOST)
    passes = steps * a_step / around.pictures
    why = f"{passes:.0f} passes over {around.pictures} pictures; 22 were better than 65 in docs/RESULTS.md"
    if steps == FEWEST > wanted:
        why += f", but at least {FEWEST} steps"
    return a_step, [Choice("max_train_steps", steps, why)]


def _fitting(config: TrainConfig, given: Collection[str], around: Surroundings, batch: int) -> list[Choice]:
    """The largest images, then no checkpointing, then the largest micro-batch for which there is room."""
    sides = [config.resolution] if "resolution" in given else _sides(around)
    a_device = max(1, batch // around.processes)
    sizes = [size for size in (4, 2, 1) if size <= a_device and a_device % size == 0]
    if "train_batch_size" in given:
        sizes = [config.train_batch_size]
    elif "gradient_accumulation_steps" in given:
        sizes = [1]
    checkpointing = (False, True)
    if "gradient_checkpointing" in given:
        checkpointing = (config.gradient_checkpointing,)
    ways = [(side, spare, size) for side in sides for spare in checkpointing for size in sizes]

    def needed(way: tuple[int, bool, int]) -> float:
        changes = {"resolution": way[0], "gradient_checkpointing": way[1], "train_batch_size": way[2]}
        return step_memory_of(dataclasses.replace(config, **changes), around.share)

    room = around.room.gib
    way = next((way for way in ways if needed(way) <= room), min(ways, key=needed))
    side, spare, size = way
    memory = f"about {needed(way):.1f} GiB of {room:.1f} on {around.room.where}"
    if needed(way) > room:
        logger.warning("a step takes %s, so it may not fit; --quantize_base 4bit takes less", memory)
    median = round(statistics.median(around.sides))
    largest = f"the base was made for {around.native}, and the pictures' shorter side has {median} (median)"
    found = [
        Choice("resolution", side, largest if side == sides[0] else f"{largest}; more doesn't fit"),
        Choice("train_batch_size", size, f"images at once on a device; a step takes {memory}"),
        Choice(
            "gradient_accumulation_steps",
            max(1, a_device // size),
            f"so that a step has {max(1, a_device // size) * size * around.processes}",
        ),
        Choice(
            "gradient_checkpointing",
            spare,
            "without it a step doesn't fit" if spare else "a step fits without it, and is quicker",
        ),
    ]
    return [choice for choice in found if choice.name not in given]


def step_memory_of(config: TrainConfig, share: float) -> float:
    """About how many GiB a training step takes with these settings; see `step_memory`."""
    return step_memory(
        samples=config.train_batch_size * (2 if config.with_prior_preservation else 1),
        resolution=config.resolution,
        half=config.mixed_precision in ("fp16", "bf16"),
        checkpointing=config.gradient_checkpointing,
        noisy=bool(config.flat_sigma),
        quantised=config.quantize_base,
        share=share,
    )


def _sides(around: Surroundings) -> list[int]:
    """Sides from the base's own down to half of it, but for those to which most pictures would grow."""
    grain = 64 if around.native >= 512 else 8
    sides = [around.native * eighths // 8 // grain * grain for eighths in (8, 7, 6, 5, 4)]
    fitting = [side for side in sides if side <= statistics.median(around.sides)]
    return list(dict.fromkeys(fitting or sides[-1:]))


def _rate(config: TrainConfig, given: Collection[str], share: float) -> list[Choice]:
    if "learning_rate" in given:
        return []
    if config.optimizer == "prodigy":
        return [Choice("learning_rate", 1.0, "Prodigy finds the rate")]
    if share < SMALL:
        return [Choice("learning_rate", 1e-3, "a small base, as docs/RESULTS.md has it")]
    return [Choice("learning_rate", 1e-4, "the paper's, for SDXL")]


def _average(config: TrainConfig, given: Collection[str]) -> list[Choice]:
    if "use_ema" not in given and config.train_text_encoder and config.train_text_encoder_frac < 1:
        return []  # they don't go together
    why = {
        "use_ema": (True, "the average's held-out loss was 0.5 to 1.8% lower in docs/RESULTS.md"),
        "ema_decay": (EMA_DECAY, "an average over about 100 steps, as there"),
    }
    wanted = config.use_ema or "use_ema" not in given
    return [Choice(name, *own) for name, own in why.items() if name not in given and wanted]


class Preset(Callback):
    """The preset of a run: chooses, says what, and writes the file when training begins.

    Args:
        name: Of the preset.
        given: The settings of the command line and its `--config`.
    """

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name = name
        self._given = given
        self._file: tuple[Path, bytes] | None = None

    def settled(self, config: TrainConfig, samples: Sequence[Sample]) -> TrainConfig:
        """The settings with what is chosen for these images.

        A run that goes on has those of its file; with other memory at hand others would be chosen now.

        Raises:
            UserError: The file was edited, and nothing says that it is to be taken.
        """
        chosen = from_main(lambda: self._chosen(config, samples))
        return TrainConfig(**{**chosen, **self._given})

    def on_train_begin(self, run: TrainingRun) -> None:
        """Write the file."""
        if self._file is not None and run.accelerator.is_main_process:
            write_atomically(*self._file)
            logger.info("the settings are in %s: edit it, and train with --config %s", *[self._file[0]] * 2)
            self._file = None

    def _chosen(self, config: TrainConfig, samples: Sequence[Sample]) -> dict[str, Any]:
        path = Path(config.output_dir, PRESET)
        if path.is_file():
            if config.resume_from_checkpoint:
                logger.info("--preset %s: the settings are those of %s", self.name, path)
                values = read_config_file(path)
                return {k: tuple(own) if isinstance(own, list) else own for k, own in values.items()}
            if not is_as_written(path.read_bytes()):
                raise UserError(
                    f"{path} was changed since --preset {self.name} wrote it: train with --config {path} in "
                    "place of --preset, or remove it"
                )
        around = surroundings(config, samples)
        choices = choose(config, self._given, around)
        heading = (
            f"--preset {self.name}, for {around.pictures} pictures of {_range(around.sides)} px (shorter "
            f"side) and {around.room.gib:.1f} GiB free on {around.room.where}"
        )
        lines = [f"{_yaml(choice.name, choice.value)}  # {choice.why}" for choice in choices]
        logger.info("%s:\n%s", heading, "\n".join(f"  {line}" for line in lines))
        if choices:
            self._file = path, self._content(config, heading, lines)
        return {choice.name: choice.value for choice in choices}

    def _content(self, config: TrainConfig, heading: str, lines: Sequence[str]) -> bytes:
        """The file: what was given, what was chosen and why, and what tells whether it was changed."""
        public = config.settings().keys() - _UNWRITTEN
        given = [_yaml(name, value) for name, value in self._given.items() if name in public]
        use = "# Edit this and train with --config and this file, in place of --preset."
        text = "\n".join([f"# {heading}.", use, "", "# Given:", *given, "", "# Chosen:", *lines, ""])
        return (text + _SEAL.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def is_as_written(content: bytes) -> bool:
    """Whether a preset's file is as it was written."""
    text, _, _ = content.rpartition(_SEAL.partition(" {}")[0].encode())
    return content == text + _SEAL.format(hashlib.sha256(text).hexdigest()).encode()


def surroundings(config: TrainConfig, samples: Sequence[Sample]) -> Surroundings:
    """Pictures, base and memory of a run.

    Raises:
        UserError: The base is missing or not SDXL, or an image is damaged.
    """
    base = config.pretrained_model_name_or_path, BASE_FLAG, config.revision
    state = PartialState()
    assert state.device is not None
    return Surroundings(
        pictures=config.repeats * sum(sample.repeats for sample in samples),
        sides=shorter_sides(samples),
        native=native_side_of(*base),
        share=unet_parameters(*base) / SDXL_PARAMETERS,
        room=room_on(state.device),
        processes=state.num_processes,
    )


def shorter_sides(samples: Sequence[Sample]) -> list[int]:
    """The shorter side of each image in pixels."""
    return [min(open_image(sample.path).size) for sample in samples]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _yaml(name: str, value: Any) -> str:
    """One line of a YAML file."""
    if not isinstance(value, (str, tuple)):
        return f"{name}: {json.dumps(value)}"
    text = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
    quoted = yaml.safe_dump(
        text, default_style='"', default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return f"{name}: {quoted.strip()}"
