"""What a run of the trainer left in its output folder, read for display: nothing is loaded or written.

Every call reads afresh, so that a run in progress can be watched. What is missing or damaged is a gap in the
result, and a line of `RunFolder.gaps`. No result but the paths of files holds a path: settings that name
folders of the user's machine are given by their last part.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import LOCK_NAME
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.flat.noise import SCHEDULES, sigma_at
from flatlora_diffusion.output.checkpoint import STATE_NAME, checkpoints, read_state
from flatlora_diffusion.output.names import ARMS, COMPARISON, FOLDER, SUMMARY, numbered_steps, step_name
from flatlora_diffusion.sheet.files import MANIFEST

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


Curve = list[tuple[int, float]]
"""Pairs (number of optimizer steps done, value), in order."""

Sheets = list[tuple[int, Path]]
"""Pairs (number of optimizer steps done, contact sheet), in order."""

# What a page is given of a summary and of an adapter's header, where it has the type that was written.
_NUMBER = (int, float)
_HEADER_KINDS = {
    "method": str,
    "rank": int,
    "alpha": _NUMBER,
    "targets": dict,
    "steps": int,
    "versions": dict,
}
_SUMMARY_KINDS = {
    "method": str,
    "images": int,
    "mean_loss_of_last_tenth": _NUMBER,
    "mean_update_norm": _NUMBER,
    "median_seconds_a_step": (*_NUMBER, type(None)),
    "peak_memory_bytes": int,
    "peak_memory_of": str,
    "device": str,
    "processes": int,
    "versions": dict,
}
_SETTING_IN_HEADER = {
    "base": "pretrained_model_name_or_path",
    "alpha": "lora_alpha",
    "steps": "max_train_steps",
}
_SETTINGS = {setting.name for setting in dataclasses.fields(TrainConfig)}
_MOST_STEPS = 1_000_000  # a curve of more is not made from a header, which may say anything


@dataclass
class History:
    """What a run has noted of itself.

    Attributes:
        source: The file that says so.
        losses: Of every step.
        heldout: Of the held-out images.
        settings: By name.
        measured: The other facts, by name.
    """

    source: Path
    losses: Curve
    heldout: Curve
    settings: dict[str, Any]
    measured: dict[str, Any]


class Reading:
    """What is in a run's folder, and what should be there and isn't.

    Args:
        folder: Where the run writes.
        comparison: The folder of the comparison of which it is an arm.

    Attributes:
        adapter: The adapter's file; None while the run is unfinished.
        finished: Whether the run has ended as planned.
        losses: Of every step.
        heldout: Loss of the held-out images.
        settings: Those that are known, by name.
        sheets: The validation pictures of the run.
        side_by_side: Those of all arms of the comparison.
        final_comparison: The picture that is drawn after training.
        gaps: A line for everything that is missing or damaged.
    """

    def __init__(self, folder: Path, comparison: Path | None) -> None:
        self.gaps: list[str] = []
        self.adapter: Path | None = None
        self.finished = False
        self.losses: Curve = []
        self.heldout: Curve = []
        self.settings: dict[str, Any] = {}
        self.sheets: Sheets = []
        self.side_by_side: Sheets = []
        self.final_comparison: Path | None = None
        self._state: str | None = None
        self._steps: int | None = None
        self._total_steps: int | None = None
        self._measured: dict[str, Any] = {}
        self._header: dict[str, Any] = {}
        self._sha256: str | None = None
        try:
            self._read_history(folder)
            self._read_pictures(folder, comparison)
        except OSError as error:  # the folder itself: it has gone, or may not be read any more
            self.gaps.append(f"the folder cannot be read: {error.strerror}")

    def _read_history(self, folder: Path) -> None:
        if not folder.is_dir():
            self.gaps.append("the folder has gone")
            return
        has_summary, has_adapter = (folder / SUMMARY).is_file(), (folder / WEIGHTS_NAME).is_file()
        summary = self._attempt(_from_summary, folder) if has_summary else None
        folders = checkpoints(folder)
        checkpoint = self._newest_sound(folders)
        goes_on = summary is not None and checkpoint is not None and _goes_on(checkpoint, summary)
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
                self._header = self._attempt(_from_header, checkpoint.source.parent / WEIGHTS_NAME) or {}
            else:
                self.gaps.append(
                    "no sound checkpoint yet, from which the losses of a run in progress are read"
                )
        if history:
            self._steps = len(history.losses)
            self.losses = self._finite("losses", history.losses)
            self.heldout = self._finite("held-out losses", history.heldout)
            self.settings, self._measured = _as_given(history.settings), history.measured
        else:
            renamed = {_SETTING_IN_HEADER.get(name, name): value for name, value in self._header.items()}
            self.settings = _as_given({name: value for name, value in renamed.items() if name in _SETTINGS})
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
        self._header = self._attempt(_from_header, file) or {}

    def _read_pictures(self, folder: Path, comparison: Path | None) -> None:
        self.sheets = _sheets(folder / FOLDER)
        drawn = numbered_steps(manifest.parent for manifest in (folder / FOLDER).glob(f"step-*/{MANIFEST}"))
        missing = sorted(set(drawn) - {step for step, _ in self.sheets})
        self.gaps += [f"the pictures after step {step} have no sheet" for step in missing]
        if comparison is not None:
            self.side_by_side = _sheets(comparison / FOLDER)
        picture = (comparison or folder) / COMPARISON
        if picture.is_file():
            self.final_comparison = picture

    def _attempt(self, read: Callable[[Path], Any], path: Path) -> Any:
        """What a function reads; None and a line where that is not what was written."""
        try:
            return read(path)
        except UserError as error:
            self.gaps.append(str(error))
            return None

    def _newest_sound(self, folders: Sequence[Path]) -> History | None:
        readings = (self._attempt(_from_checkpoint, folder) for folder in folders)
        return next((history for history in readings if history), None)

    def _finite(self, what: str, curve: Curve) -> Curve:
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        if len(finite) < len(curve):
            self.gaps.append(f"{len(curve) - len(finite)} of the {what} are not finite numbers")
        return finite

    def sigmas(self) -> Curve:
        """sigma_t at each step that has been done; empty where sigma, schedule or length aren't known."""
        sigma, schedule = self.settings.get("flat_sigma"), self.settings.get("flat_schedule")
        if not isinstance(sigma, _NUMBER) or not isinstance(schedule, str) or schedule not in SCHEDULES:
            return []
        done = self._steps or (self._total_steps if self.finished else 0)
        total = done if sigma == 0 or schedule == "constant" else self._total_steps
        if not isinstance(total, int) or not 0 < done <= _MOST_STEPS or not math.isfinite(sigma):
            return []
        return [(step + 1, sigma_at(sigma, step, total, schedule)) for step in range(done)]

    def facts(self) -> dict[str, Any]:
        """What is known of the run and its adapter by name, as `RunFolder.facts` lists it."""
        facts = {
            "state": self._state,
            **{name: self._header.get(name, self._measured.get(name)) for name in _HEADER_KINDS},
            "steps": self._total_steps if self.finished else self._steps,
            "total_steps": self._total_steps,
            **{name: value for name, value in self._measured.items() if name not in _HEADER_KINDS},
            "sha256": self._sha256,
        }
        return {name: value for name, value in facts.items() if value is not None}


def _goes_on(checkpoint: History, summary: History) -> bool:
    """Whether a checkpoint is of a run that was taken up again after its summary had been written.

    A longer run that had the folder before left checkpoints of more steps too, but older ones.
    """
    more = len(checkpoint.losses) > len(summary.losses)
    return more and checkpoint.source.stat().st_mtime_ns > summary.source.stat().st_mtime_ns


def _from_summary(folder: Path) -> History:
    path = folder / SUMMARY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return History(
            path,
            _curve(enumerate(content["losses"], start=1)),
            _curve(content["heldout_losses"].items()),
            dict(content["settings"]),
            _well_typed(content, _SUMMARY_KINDS),
        )
    except OSError as error:
        raise UserError(f"{SUMMARY} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{SUMMARY} is not what was written") from error


def _from_checkpoint(folder: Path) -> History:
    """The history in a checkpoint; its tensors, which may be large, are not read."""
    try:
        state = read_state(folder)
        return History(
            folder / STATE_NAME,
            _curve(enumerate(state["scalars"]["losses"], start=1)),
            _curve(state["scalars"]["heldout_losses"].items()),
            state["settings"],
            _well_typed(state["settings"], {"processes": int}),
        )
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder.name}: {STATE_NAME} is not what was written") from error


def _from_header(file: Path) -> dict[str, Any]:
    """The facts in an adapter's header: other people's files may hold anything there."""
    try:
        facts = read_facts(file)
    except UserError as error:
        raise UserError(f"{file.name} is not a sound safetensors file") from error
    if not facts:
        raise UserError(f"{file.name} says nothing of its making: it is not of this trainer")
    try:
        _well_typed(facts, _HEADER_KINDS)
        return dict(facts)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.name}: the facts in its header are not what was written") from error


def _as_given(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint or a header as a summary has them, which doesn't say what None stands for."""
    given = dict(settings)
    if "lora_alpha" in given and given["lora_alpha"] == given.get("rank"):
        given["lora_alpha"] = None
    if given.get("mixed_precision") == "no":
        given["mixed_precision"] = None
    return given


def _well_typed(content: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What `content` has of these names; a TypeError where one is of another type."""
    known = {name: content[name] for name in kinds if name in content}
    for name, value in known.items():
        if not isinstance(value, kinds[name]):
            raise TypeError(f"{name} {value!r}")
    return known


def _curve(values: Iterable[tuple[int | str, Any]]) -> Curve:
    """Pairs of a step and a number, in order; a ValueError or TypeError where they are something else."""
    curve = []
    for step, value in values:
        if not isinstance(value, _NUMBER):
            raise TypeError(f"{value!r} is not a number")
        curve.append((int(step), float(value)))
    return sorted(curve)


def _sheets(folder: Path) -> Sheets:
    steps = numbered_steps(folder.glob("step-*.png"))
    sheets = [(step, folder / f"{step_name(step)}.png") for step in steps]
    return [(step, sheet) for step, sheet in sheets if sheet.is_file()]


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, modified: int, size: int) -> str:
    """SHA-256 of a file, which is read again only when it has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
