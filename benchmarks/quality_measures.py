"""The measures of the runs of `benchmarks.quality`: which there are, read from the disk and compared.

`WORK/runs/ARM/seed-K/measures.json` holds the measures of a run: part -> name -> number, and under
`measured_with` a digest of the constants of that part (see `benchmarks.adapter_measures`).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paired import Difference, difference
from benchmarks.quality_arms import Arm, run_folder
from benchmarks.quality_runs import change_since

MEASURES = "measures.json"
MEASURED_WITH = "measured_with"

PARTS = ("losses", "scales", "rounded", "sharpness", "drawn")
"""What is measured together."""

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
    Measure("rounded_attention_4_heldout_loss", "held-out loss, attention in 4 bits"),
    Measure("rounded_attention_3_heldout_loss", "held-out loss, attention in 3 bits"),
    Measure("rounded_all_4_heldout_loss", "held-out loss, all weights in 4 bits"),
    Measure("clip_i", "CLIP-I", better=1, relative=False),
    Measure("nearest_training", "likeness to the nearest training icon", better=0, relative=False),
    Measure("clip_t", "CLIP-T", better=1, relative=False),
    Measure("drift", "drift"),
)


def read_parts(folder: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What was measured of a run, as its file has it, and what is wrong with that file.

    Nothing was measured where there is no file, or where something is wrong with it.
    """
    from flatlora_diffusion.adapter.file import (
        WEIGHTS_NAME,  # it brings libraries that must be told to be quiet
    )

    file, adapter = folder / MEASURES, folder / WEIGHTS_NAME
    if not file.is_file():
        return {}, None
    try:
        if adapter.is_file() and file.stat().st_mtime < adapter.stat().st_mtime:
            return {}, "older than the adapter; measure that run again"
        content = json.loads(file.read_bytes())
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return {}, "not JSON; measure that run again"
    if not (isinstance(content, dict) and content and all(isinstance(p, dict) for p in content.values())):
        return {}, "not the measures of each part; measure that run again"
    return content, None


def read_runs(work: Path, arms: Mapping[str, Arm]) -> tuple[Runs, list[str]]:
    """The measures of all runs, and a line for each file or run that is left out and each measure it lacks.

    Left out are damaged files, those that are older than the adapter, and runs whose arm has changed since.
    """
    runs: Runs = {name: {} for name in arms}
    problems = []
    for name in runs:
        folders = run_folder(work, name, 0).parent.glob("seed-*")
        seeds = [int(number) for number in (folder.name[5:] for folder in folders) if number.isdecimal()]
        for seed in sorted(seeds):
            folder = run_folder(work, name, seed)
            where = folder.relative_to(work) / MEASURES
            if changed := change_since(work, name, arms[name], seed):
                problems.append(f"{changed}; remove that folder and train it again")
                continue
            parts, problem = read_parts(folder)
            if problem:
                problems.append(f"{where}: {problem}")
            if not parts:
                continue
            content = {k: v for part in parts.values() for k, v in part.items() if k != MEASURED_WITH}
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
