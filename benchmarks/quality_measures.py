"""The measures of the runs of `benchmarks.quality`: which there are, read from the disk and compared.

`WORK/runs/ARM/seed-K/measures.json` holds the measures of a run, name -> number.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paired import Difference, difference
from benchmarks.quality_arms import Arm, run_folder

MEASURES = "measures.json"

PARTS = {
    "losses": "train_loss",
    "scales": "scale_0.8_train_loss",
    "sharpness": "top_eigenvalue",
    "drawn": "clip_i",
}
"""What is measured together -> a measure that tells that it was."""

Runs = dict[str, dict[int, dict[str, float]]]
"""Name of an arm -> seed -> name of a measure -> value."""


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    Attributes:
        name: In the runs' files.
        label: In the table's head.
        better: -1 where lower is better, 1 where higher is, 0 where neither is.
        relative: Whether differences are told in % of the plain arm's mean.
    """

    name: str
    label: str
    better: int = -1
    relative: bool = True


MAIN = (
    Measure("train_loss", "training loss", better=0),
    Measure("heldout_loss", "held-out loss"),
    Measure("retention_loss", "retention loss"),
    Measure("rise_0.1", "rise under noise, sigma 0.1"),
    Measure("rise_0.3", "rise under noise, sigma 0.3"),
    Measure("update_norm", "norm of dW", better=0),
)
OTHERS = (
    *(Measure(f"heldout_loss_band_{k}", f"held-out loss, band {k}") for k in range(4)),
    Measure("clip_i", "CLIP-I", better=1, relative=False),
    Measure("nearest_training", "likeness to the nearest training icon", better=0, relative=False),
    Measure("clip_t", "CLIP-T", better=1, relative=False),
    Measure("drift", "drift"),
)


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds its adapter and all that belongs to it."""
    from flatlora_diffusion.run import SUMMARY  # it brings libraries that must be told first to be quiet

    return (folder / SUMMARY).is_file()


def read_measures(folder: Path) -> dict[str, float]:
    """What was measured of a run; nothing where the file is older than the adapter, or damaged."""
    from flatlora_diffusion.export import WEIGHTS_NAME

    file = folder / MEASURES
    try:
        if file.stat().st_mtime < (folder / WEIGHTS_NAME).stat().st_mtime:
            return {}
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def missing_parts(arm: Arm, folder: Path) -> set[str]:
    """Those of `PARTS` that are still to be measured of a finished run."""
    measures = read_measures(folder)
    wanted = ["losses", *["scales"] * arm.over_scales, *["sharpness", "drawn"] * arm.featured]
    return {part for part in wanted if PARTS[part] not in measures}


def read_runs(work: Path, arms: Iterable[str]) -> tuple[Runs, list[str]]:
    """The measures of all runs, and a line for each file that is damaged and each measure that it lacks."""
    runs: Runs = {name: {} for name in arms}
    problems = []
    for name in runs:
        folders = run_folder(work, name, 0).parent.glob("seed-*")
        seeds = [int(number) for number in (folder.name[5:] for folder in folders) if number.isdecimal()]
        for seed in sorted(seeds):
            path = run_folder(work, name, seed) / MEASURES
            if not path.is_file():
                continue
            where = path.relative_to(work)
            try:
                content = json.loads(path.read_bytes())
            except OSError as error:
                problems.append(f"{where}: cannot be read ({error.strerror})")
                continue
            except (ValueError, RecursionError):
                problems.append(f"{where}: not JSON; measure that run again")
                continue
            if not isinstance(content, dict):
                problems.append(f"{where}: not a dictionary of measures; measure that run again")
                continue
            numbers = {key: float(value) for key, value in content.items() if _is_finite(value)}
            bad = [key for key in content if key not in numbers]
            if bad:
                problems.append(f"{where}: not a finite number: {', '.join(bad)}")
            lacking = [measure.name for measure in MAIN if measure.name not in content]
            if lacking:
                problems.append(f"{where}: lacks {', '.join(lacking)}")
            if numbers:
                runs[name][seed] = numbers
    return runs, problems


def _is_finite(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


@dataclass(frozen=True)
class Compared:
    """A difference and what it is told in.

    Attributes:
        difference: Arm less plain.
        plain: The plain arm's mean over the same seeds.
        position: Mean inference scale or number of steps of the plain arm, where it was chosen.
    """

    difference: Difference
    plain: float
    position: float | None = None


def values_of(seeds: Mapping[int, Mapping[str, float]], measure: str) -> dict[int, float]:
    """Seed -> value of one measure, of the runs that have it."""
    return {seed: measures[measure] for seed, measures in seeds.items() if measure in measures}


def compare(ours: Mapping[int, float], plain: Mapping[int, float]) -> Compared | None:
    """Two arms by seed -> value; None where they share fewer than two seeds."""
    shared = ours.keys() & plain.keys()
    if len(shared) < 2:
        return None
    return Compared(difference(ours, plain), statistics.fmean(plain[seed] for seed in shared))
