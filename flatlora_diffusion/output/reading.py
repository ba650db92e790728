"""What a run of the trainer left in its output folder, read for display: nothing is loaded or written.

Every `RunFolder.read` reads afresh, so that a run in progress can be watched. What is missing or damaged is a
gap in the result, and a line of `Reading.gaps`. No result but the paths of files holds a path: settings that
name folders of the user's machine are given by their last part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.strength import Strength, file_digest, read_strength
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import LOCK_NAME
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.flat.noise import SCHEDULES, sigma_at
from flatlora_diffusion.output.checkpoint import checkpoints
from flatlora_diffusion.output.folds import read_folds
from flatlora_diffusion.output.history import (
    HEADER_KINDS,
    NUMBER,
    Curve,
    History,
    from_checkpoint,
    from_summary,
    header_facts,
)
from flatlora_diffusion.output.names import ARMS, COMPARISON, FOLDER, SUMMARY, numbered_steps, step_name
from flatlora_diffusion.sheet.files import MANIFEST

SMOOTHING = 0.95

Sheets = list[tuple[int, Path]]
"""Pairs (number of optimizer steps done, contact sheet), in order."""

_FIELDS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}
_SETTING_IN_HEADER = {
    "base": "pretrained_model_name_or_path",
    "alpha": "lora_alpha",
    "steps": "max_train_steps",
}
_MOST_STEPS = 1_000_000  # no longer curve is made: a header may claim any number


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

    def read(self) -> Reading:
        """What is in the folder now."""
        return Reading(self)


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


def _as_shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a summary, a checkpoint or a header as `Reading.settings` has them."""
    shown = {name: _without_folders(name, settings[name]) for name in _FIELDS if name in settings}
    # A summary doesn't say what None stands for.
    if "lora_alpha" in shown and shown["lora_alpha"] == shown.get("rank"):
        shown["lora_alpha"] = None
    if shown.get("mixed_precision") == "no":
        shown["mixed_precision"] = None
    return dict(sorted(shown.items(), key=lambda setting: is_default(*setting)))  # the sort is stable


def _image_folders(run: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """The folders with images that settings name, as paths: relative ones begin somewhere above the run's."""
    found = {}
    for name in ("instance_data_dir", "heldout_data_dir"):
        if isinstance(given := settings.get(name), str):
            places = [place / given for place in run.resolve().parents]  # an absolute one stays what it is
            there = next((place for place in places if place.is_dir()), None)
            found |= {name: there} if there else {}
    return found


def _without_folders(name: str, value: Any) -> Any:
    """The last part of a setting that names a folder; hub names lose their owner, as on the sheets."""
    folders = name.endswith(("_dir", "_name_or_path")) or name in ("dataset_name", "resume_from_checkpoint")
    if not folders or value is None:
        return value
    return PureWindowsPath(str(value)).name or str(value)  # it knows both kinds of slashes


class Reading:
    """What was in a run's folder when it was read, and what should have been there and wasn't.

    Args:
        run: Whose folder is read.

    Attributes:
        run: Whose folder was read.
        adapter: The adapter's file; None while the run is unfinished.
        finished: Whether the run has ended as planned; one that goes on beyond its summary is not finished
            any more.
        losses: The loss of every optimizer step: from the summary, or from the newest sound checkpoint.
        smoothed: `losses` as an exponential mean with weight `SMOOTHING`: see `exponential_mean`.
        sigmas: sigma_t, the strength of the noise in force during each step that has been done; empty where
            sigma, schedule or length aren't known.
        heldout: The loss of the held-out images after the steps at which it was measured.
        folds: Of a run that has found its number of steps by folds: what each is called -> its curve of the
            same kind, that of their mean first.
        average: What folds have found of --use_ema, in words; None where they weren't asked.
        validation: Step -> sheet of the pictures that were drawn after it, in order.
        side_by_side: Step -> sheet of all arms of the comparison beside the base; none for a single run.
        final_comparison: The picture of base and adapters that is drawn after training, where there is one.
        settings: Settings of the run by name: first those that are not `TrainConfig`'s defaults, then the
            rest. A checkpoint knows those that decide the result, an adapter alone the few in its header.
        image_folders: `instance_data_dir` and `heldout_data_dir` -> that folder, where it is still there.
        facts: What is known of the run and its adapter, as far as it is: `state` ("finished", "unfinished"),
            `method`, `rank`, `alpha`, `targets` (model -> layers), `steps` done and `total_steps` planned,
            `images`, `mean_loss_of_last_tenth`, `mean_update_norm`, `median_seconds_a_step`,
            `peak_memory_bytes`, `peak_memory_of` ("GPU", "process"), `device`, `processes`, `versions`
            (package -> version), and `sha256` of the adapter's file.
        strength: The scale that an evaluation has noted in the adapter's file; None where there is none.
        gaps: A line for everything that should be there and is missing or damaged.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.gaps: list[str] = []
        self.adapter: Path | None = None
        self.strength: Strength | None = None
        self.finished = False
        self.losses: Curve = []
        self.heldout: Curve = []
        self.folds: dict[str, Curve] = {}
        self.average: str | None = None
        self.settings: dict[str, Any] = {}
        self.validation: Sheets = []
        self.side_by_side: Sheets = []
        self.final_comparison: Path | None = None
        self.image_folders: dict[str, Path] = {}
        self._state: str | None = None
        self._steps: int | None = None
        self._total_steps: int | None = None
        self._measured: dict[str, Any] = {}
        self._header: dict[str, Any] = {}
        self._sha256: str | None = None
        try:
            self._read_history(run.folder)
            self._read_pictures(run.folder, run.comparison)
            self._read_folds(run.folder)
        except OSError as error:  # the folder itself: it has gone, or may not be read any more
            self.gaps.append(f"the folder cannot be read: {error.strerror}")
        means = exponential_mean([loss for _, loss in self.losses], SMOOTHING)
        self.smoothed: Curve = [(step, mean) for (step, _), mean in zip(self.losses, means, strict=True)]
        self.sigmas = self._sigmas()
        self.facts = self._facts()

    def _read_history(self, folder: Path) -> None:
        if not folder.is_dir():
            self.gaps.append("the folder has gone")
            return
        has_summary, has_adapter = (folder / SUMMARY).is_file(), (folder / WEIGHTS_NAME).is_file()
        summary = self._attempt(from_summary, folder) if has_summary else None
        folders = checkpoints(folder)
        checkpoint = self._newest_sound(folders)
        goes_on = summary is not None and checkpoint is not None and checkpoint.goes_on_after(summary)
        # Without a summary and without checkpoints it is an adapter that was copied.
        self.finished = not goes_on and (has_summary or (has_adapter and not folders))
        self._state, self._steps = "finished" if self.finished else "unfinished", 0
        if self.finished:
            history = summary or checkpoint
            self._read_adapter(folder / WEIGHTS_NAME)
            if not has_summary:
                self.gaps.append(f"{SUMMARY} is missing: losses, time and memory are not known")
        else:
            history = checkpoint
            if checkpoint:
                self._header = self._attempt(header_facts, checkpoint.source.parent / WEIGHTS_NAME) or {}
            else:
                self.gaps.append(
                    "no sound checkpoint yet, from which the losses of a run in progress are read"
                )
        if history:
            self._steps = len(history.losses)
            self.losses = self._finite("losses", history.losses)
            self.heldout = self._finite("held-out losses", history.heldout)
            self.settings, self._measured = _as_shown(history.settings), history.measured
            self.image_folders = _image_folders(folder, history.settings)
        else:
            renamed = {_SETTING_IN_HEADER.get(name, name): value for name, value in self._header.items()}
            self.settings = _as_shown(renamed)
        if not self.finished:
            # Where no schedule stretches over the steps, a checkpoint doesn't know how many are planned.
            self._total_steps = self.settings.get("max_train_steps")
        elif summary:
            self._total_steps = self._steps
        else:
            self._total_steps = self._header.get("steps", self.settings.get("max_train_steps"))

    def _read_adapter(self, file: Path) -> None:
        if not file.is_file():
            self.gaps.append(f"{WEIGHTS_NAME} is missing")
            return
        self.adapter = file
        status = file.stat()
        self._sha256 = _sha256(file, status.st_mtime_ns, status.st_size)
        self._header = self._attempt(header_facts, file) or {}
        self.strength = read_strength(file) if self._header else None

    def _read_pictures(self, folder: Path, comparison: Path | None) -> None:
        self.validation = _sheets(folder / FOLDER)
        drawn = numbered_steps(manifest.parent for manifest in (folder / FOLDER).glob(f"step-*/{MANIFEST}"))
        missing = sorted(set(drawn) - {step for step, _ in self.validation})
        self.gaps += [f"the pictures after step {step} have no sheet" for step in missing]
        if comparison is not None:
            self.side_by_side = _sheets(comparison / FOLDER)
        picture = (comparison or folder) / COMPARISON
        if picture.is_file():
            self.final_comparison = picture

    def _read_folds(self, folder: Path) -> None:
        # Without that setting they are of an earlier run in this folder.
        found = self._attempt(read_folds, folder) if self.settings.get("folds") else None
        if found:
            self.average = found.comparison()
            curves = {f"fold {number}": own for number, own in enumerate(found.curves, start=1)}
            curves = {f"mean of {len(curves)} folds": found.mean, **curves}
            self.folds = {
                name: self._finite(f"held-out losses of the {name}", sorted(own.items()))
                for name, own in curves.items()
            }

    def _attempt(self, read: Callable[[Path], Any], path: Path) -> Any:
        """What a function reads; None and a line where that is not what was written."""
        try:
            return read(path)
        except UserError as error:
            self.gaps.append(str(error))
            return None

    def _newest_sound(self, folders: Sequence[Path]) -> History | None:
        readings = (self._attempt(from_checkpoint, folder) for folder in folders)
        return next((history for history in readings if history), None)

    def _finite(self, what: str, curve: Curve) -> Curve:
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        if len(finite) < len(curve):
            self.gaps.append(f"{len(curve) - len(finite)} of the {what} are not finite numbers")
        return finite

    def _sigmas(self) -> Curve:
        sigma, schedule = self.settings.get("flat_sigma"), self.settings.get("flat_schedule")
        if not isinstance(sigma, NUMBER) or not isinstance(schedule, str) or schedule not in SCHEDULES:
            return []
        done = self._steps or (self._total_steps if self.finished else 0)
        total = done if sigma == 0 or schedule == "constant" else self._total_steps
        if not isinstance(done, int) or not isinstance(total, int):
            return []
        if not 0 < done <= _MOST_STEPS or not math.isfinite(sigma):
            return []
        return [(step + 1, sigma_at(sigma, step, total, schedule)) for step in range(done)]

    def _facts(self) -> dict[str, Any]:
        facts = {
            "state": self._state,
            **{name: self._header.get(name, self._measured.get(name)) for name in HEADER_KINDS},
            "steps": self._total_steps if self.finished else self._steps,
            "total_steps": self._total_steps,
            **{name: value for name, value in self._measured.items() if name not in HEADER_KINDS},
            "sha256": self._sha256,
        }
        return {name: value for name, value in facts.items() if value is not None}


def _sheets(folder: Path) -> Sheets:
    steps = numbered_steps(folder.glob("step-*.png"))
    sheets = [(step, folder / f"{step_name(step)}.png") for step in steps]
    return [(step, sheet) for step, sheet in sheets if sheet.is_file()]


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, modified: int, size: int) -> str:
    """SHA-256 of a file, which is read again only when it has changed."""
    return file_digest(file)
