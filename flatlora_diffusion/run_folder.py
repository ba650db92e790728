"""What a run of the trainer left in its output folder, read for display: nothing is loaded or written.

Every call reads afresh, so that a run in progress can be watched. What is missing or damaged is a gap in the
result, and a line of `RunFolder.gaps`. No result but the paths of files holds a path: settings that name
folders of the user's machine are given by their last part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from flatlora_diffusion.checkpoint import checkpoints
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.errors import UserError
from flatlora_diffusion.export import WEIGHTS_NAME
from flatlora_diffusion.output_folder import LOCK_NAME
from flatlora_diffusion.run import SUMMARY
from flatlora_diffusion.run_reading import Curve, Reading, Sheets

ARMS = {"LoRA": "lora", "Flat-LoRA": "flat_lora"}
"""Label of each arm of a comparison -> its folder, as `train` names it."""

SMOOTHING = 0.95

_FIELDS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}


def find_runs(folder: Path) -> dict[str, RunFolder]:
    """The runs in an output folder by their labels: that of the folder itself, or the arms of a comparison.

    The label of a run is the name of its folder, that of an arm its method. A run counts from the moment at
    which the trainer has locked its folder.

    Raises:
        UserError: There is no finished or unfinished run.
    """
    advice = "give the --output_dir of a training run"
    if not folder.is_dir():
        raise UserError(f"--run {folder}: {'a file' if folder.exists() else 'no such folder'}; {advice}")
    arms = {label: folder / name for label, name in ARMS.items()}
    compared = any(map(_holds_run, arms.values()))
    runs = {}
    if _holds_results(folder) or (_holds_run(folder) and not compared):
        name = folder.resolve().name
        label = f"{name} (not compared)" if compared and name in arms else name
        runs[label] = RunFolder(folder, label)
    if compared:  # the trainer makes both folders at its start
        runs |= {label: RunFolder(arm, label, folder) for label, arm in arms.items() if arm.is_dir()}
    if not runs:
        names = " and ".join(f"{name}/" for name in ARMS.values())
        raise UserError(
            f"--run {folder}: no run in it (neither {SUMMARY}, {WEIGHTS_NAME} nor a checkpoint, there or in "
            f"{names}); {advice}"
        )
    return runs


def _holds_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SUMMARY, WEIGHTS_NAME)) or bool(checkpoints(folder))


def _holds_run(folder: Path) -> bool:
    return _holds_results(folder) or (folder / LOCK_NAME).is_file()


@dataclass(frozen=True)
class RunFolder:
    """The output folder of one run, finished or not, or a folder with nothing but an adapter.

    Attributes:
        folder: Where the run writes.
        label: What it is called on the page.
        comparison: The folder of the comparison of which this run is an arm.
    """

    folder: Path
    label: str
    comparison: Path | None = None

    @property
    def adapter(self) -> Path | None:
        """The adapter's file; None while the run is unfinished."""
        return self._read().adapter

    @property
    def finished(self) -> bool:
        """Whether the run has ended as planned; one that goes on beyond its summary is unfinished again."""
        return self._read().finished

    def losses(self) -> Curve:
        """The loss of every optimizer step: from the summary, or from the newest sound checkpoint."""
        return self._read().losses

    def smoothed(self) -> Curve:
        """`losses` as an exponential mean with weight `SMOOTHING`: see `exponential_mean`."""
        losses = self.losses()
        means = exponential_mean([loss for _, loss in losses], SMOOTHING)
        return [(step, mean) for (step, _), mean in zip(losses, means, strict=True)]

    def sigmas(self) -> Curve:
        """sigma_t, the strength of the noise in force during each step that has been done."""
        return self._read().sigmas()

    def heldout(self) -> Curve:
        """The loss of the held-out images after the steps at which it was measured."""
        return self._read().heldout

    def validation(self) -> Sheets:
        """Step -> sheet of the pictures that were drawn after it, in order."""
        return self._read().sheets

    def side_by_side(self) -> Sheets:
        """Step -> sheet of all arms of the comparison beside the base, in order; none for a single run."""
        return self._read().side_by_side

    def final_comparison(self) -> Path | None:
        """The picture of base and adapters that is drawn after training, where there is one."""
        return self._read().final_comparison

    def settings(self) -> dict[str, Any]:
        """Settings of the run by name: first those that are not `TrainConfig`'s defaults, then the rest.

        A checkpoint knows those that decide the result, an adapter alone the few in its header.
        """
        known = self._read().settings
        known = {name: _without_folders(name, known[name]) for name in _FIELDS if name in known}
        return dict(sorted(known.items(), key=lambda setting: is_default(*setting)))  # the sort is stable

    def facts(self) -> dict[str, Any]:
        """What is known of the run and its adapter, as far as it is.

        `state` ("finished", "unfinished"), `method`, `rank`, `alpha`, `targets` (model -> layers), `steps`
        done and `total_steps` planned, `images`, `mean_loss_of_last_tenth`, `mean_update_norm`,
        `median_seconds_a_step`, `peak_memory_bytes`, `peak_memory_of` ("GPU", "process"), `device`,
        `processes`, `versions` (package -> version), and `sha256` of the adapter's file.
        """
        return self._read().facts()

    def gaps(self) -> list[str]:
        """A line for everything that should be there and is missing or damaged."""
        return self._read().gaps

    def _read(self) -> Reading:
        return Reading(self.folder, self.comparison)


def exponential_mean(values: Sequence[float], weight: float) -> list[float]:
    """Running mean in which a value counts `weight` times as much with every step that follows it.

    `mean_k = sum_i weight^(k-i) * value_i / sum_i weight^(k-i)`, over i up to k: the first mean is the first
    value, and means don't change when values follow. It looks back over about 1 / (1 - weight) values.
    """
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm)
    return means


def is_default(name: str, value: Any) -> bool:
    """Whether a setting has the value that it has where nobody gives one."""
    default = _FIELDS[name].default
    return default is not dataclasses.MISSING and value == default


def _without_folders(name: str, value: Any) -> Any:
    """The last part of a setting that names a folder; hub names lose their owner, as on the sheets."""
    folders = name.endswith(("_dir", "_name_or_path")) or name in ("dataset_name", "resume_from_checkpoint")
    if not folders or value is None:
        return value
    return PureWindowsPath(str(value)).name or str(value)  # it knows both kinds of slashes
