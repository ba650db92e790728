"""Trackers that accelerate knows: whether one can be used, what it calls a run, the pictures that it gets."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from flatlora_diffusion.common.errors import UserError

logger = logging.getLogger(__name__)

PROJECT = "dreambooth-lora-sd-xl"
"""What the diffusers script calls the project of a tracker."""

# Where a tracker takes the name of a run within its project.
_RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


@dataclass
class Tracked:
    """The trackers of a run, open until `finish`.

    Attributes:
        trackers: Of accelerate.
        epoch: The run's last one, counted from 0.
    """

    trackers: Sequence[GeneralTracker] = ()
    epoch: int = 0

    def finish(self) -> None:
        """Close them."""
        for tracker in self.trackers:
            tracker.finish()


def check_tracker(report_to: str | None) -> None:
    """Refuse a tracker that accelerate doesn't know or whose package is missing, before anything is done.

    TensorBoard is passed over: it is the default, so nobody may have asked for it.

    Raises:
        UserError: Names the package, or the trackers that there are.
    """
    if report_to in (None, "none", "all", "tensorboard"):
        return
    if report_to not in LoggerType.list() and report_to not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted({"none", *LoggerType.list()}))
        raise UserError(f"--report_to {report_to}: accelerate knows no such tracker (it knows {known})")
    if report_to not in map(str, get_available_trackers()):
        package = report_to.replace("_", "-")  # accelerate would train without a tracker
        raise UserError(
            f"--report_to {report_to} needs the package {package}: pip install {package}, or give none"
        )


def usable_tracker(report_to: str | None) -> str | None:
    """What accelerate is told of `--report_to`; None where nothing is to be tracked.

    Raises:
        UserError: As `check_tracker`.
    """
    check_tracker(report_to)
    if report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        logger.warning("tensorboard isn't installed, so nothing is tracked (pip install tensorboard)")
        return None
    return None if report_to == "none" else report_to


def named(run: str) -> dict[str, dict[str, str]]:
    """Settings of trackers that call a run so; TensorBoard has the folder's name for it."""
    return {tracker: {setting: run} for tracker, setting in _RUN_NAMES.items()}


def report_pictures(
    trackers: Iterable[Any], phase: str, pictures: Sequence[Image.Image], captions: Sequence[str], epoch: int
) -> None:
    """Send pictures of one size to TensorBoard and wandb, under the step that the diffusers script gives.

    Args:
        trackers: All that are open.
        phase: What the pictures are called there: `validation`, or `test` for those after training.
        pictures: At least one.
        captions: One for each.
        epoch: Counted from 0. TensorBoard has it for the step; wandb puts pictures at its newest step.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(picture) for picture in pictures])
            tracker.log_images({phase: stack}, step=epoch, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]  # the user's, if at all

            captioned = [
                wandb.Image(picture, caption=caption)
                for picture, caption in zip(pictures, captions, strict=True)
            ]
            tracker.log({phase: captioned})
