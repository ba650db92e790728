"""The names of what a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flatlora_diffusion.config.settings import FLAT, PLAIN

FOLDER = "validation"


def step_name(step: int) -> str:
    """Folder of the pictures after a step."""
    return f"step-{step:06d}"


def numbered_steps(files: Iterable[Path]) -> list[int]:
    """The steps in the names of files or folders `step-NNNNNN*`, in order."""
    numbers = [path.stem.removeprefix("step-") for path in files]
    return sorted(int(number) for number in numbers if number.isdigit())


COMPARISON = "comparison.png"


BEST = "best"  # folder of the adapter whose held-out loss was lowest, where it isn't the last one
FOLDS = "folds"  # folder of the runs without a part of the images, and of their curves
SUMMARY = "summary.json"
LIVE_HELDOUT = "heldout_losses_live"  # in a fold's summary and checkpoints: of the adapter, not its average
PRESET = "preset.yaml"  # what --preset chose, and what was given
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"  # as the diffusers script calls it


ARMS = {PLAIN: "lora", FLAT: "flat_lora"}
"""Method of each arm of a comparison, in the order of training -> its folder."""
