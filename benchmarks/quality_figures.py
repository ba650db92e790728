"""The plots of `benchmarks.quality`: what was measured of its runs, as figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.matched import scale_curve
from benchmarks.paired import bootstrap_interval
from benchmarks.quality_arms import Arm
from benchmarks.quality_measures import Compared, Runs, compare, values_of
from benchmarks.quality_plots import Difference, Point, Series, curves, forest, scatter
from flatlora_diffusion.evaluate.figures import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORESTS = {
    "heldout_loss": "Loss on held-out icons of the taught style",
    "retention_loss": "Loss on icons of the base's own styles",
    "rise_0.1": "Rise of the training loss under noise (sigma 0.1)",
}

Axis = tuple[str, str]
"""A measure, and what an axis calls it."""

HELDOUT = ("heldout_loss", "loss on held-out icons of the style  (better is lower)")
RETENTION = ("retention_loss", "loss on the base's own styles  (better is lower)")
RISE = ("rise_0.1", "rise of the training loss under noise, sigma 0.1  (flatter is lower)")
SCATTERED = {"style-against-retention": (HELDOUT, RETENTION), "flatness-against-style": (RISE, HELDOUT)}
# Group of arms -> group in the plots of two measures, and the setting that is its points' label.
SHOWN = {
    "mild": ("Flat-LoRA, by sigma", "flat_sigma"),
    "shorter": ("LoRA, by steps", "max_train_steps"),
    "regularisers": ("regularisers", None),
    "rivals": ("rivals", None),
}
PLAIN, SCHEDULES = "mild-lora", {"cosine": "mild", "constant": "schedule"}


def write_figures(runs: Runs, arms: Mapping[str, Arm], folder: Path) -> list[Path]:
    """Write the figures for which there are runs, as PNG files.

    Args:
        runs: What was measured.
        arms: All arms, by name.
        folder: Must exist.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    figures: dict[str, Figure | None] = {
        f"{measure}.png": _forest(runs, arms, measure, title) for measure, title in FORESTS.items()
    }
    figures["sigma.png"] = _over_sigma(runs, arms, "rise_0.1")
    figures |= {f"{name}.png": _scattered(runs, arms, *axes) for name, axes in SCATTERED.items()}
    figures["scales.png"] = _over_scales(runs, arms, HELDOUT, RETENTION)
    written = {folder / name: figure for name, figure in figures.items() if figure is not None}
    for path, figure in written.items():
        write_png(figure, path)
    return list(written)


def _in_percent(found: Compared) -> tuple[float, float, float]:
    """Mean, low and high of a difference, in % of the plain arm's mean."""
    d = found.difference
    return tuple(100 * value / found.plain for value in (d.mean, d.low, d.high))


def _compared(runs: Runs, arm: Arm, name: str, measure: str) -> Compared | None:
    return compare(values_of(runs[name], measure), values_of(runs[arm.against], measure))


def _forest(runs: Runs, arms: Mapping[str, Arm], measure: str, title: str) -> Figure | None:
    rows = []
    for name, arm in arms.items():
        found = _compared(runs, arm, name, measure) if arm.against else None
        if found:
            rows.append(Difference(arm.group, arm.label, *_in_percent(found), found.difference.n))
    rows.sort(key=lambda row: [arm.group for arm in arms.values()].index(row.group))
    return forest(rows, title, "% of plain LoRA's") if rows else None


def _over_sigma(runs: Runs, arms: Mapping[str, Arm], measure: str) -> Figure | None:
    """The measure's change over the strength of the training noise, for both schedules."""
    series = []
    for schedule, group in SCHEDULES.items():
        points = {}
        for name, arm in arms.items():
            if arm.group == group and arm.against == PLAIN:
                found = _compared(runs, arm, name, measure)
                if found:
                    points[arm.settings["flat_sigma"]] = _in_percent(found)
        if points:
            sigmas = sorted(points)
            series.append(Series(schedule, sigmas, [points[sigma] for sigma in sigmas]))
    if not any(len(one.sigmas) > 1 for one in series):  # a point is no curve
        return None
    return curves(series, "change of the rise of the loss under noise, %", 0)


def _scattered(runs: Runs, arms: Mapping[str, Arm], x_axis: Axis, y_axis: Axis) -> Figure | None:
    """The arms of the mild regime in two measures; over sigma, steps and inference scales as curves."""
    own = arms[PLAIN].label
    plain = f"{own}, by inference scale"
    points = _by_scale(runs[PLAIN], plain, x_axis, y_axis, own)
    points = points or _points(own, own, runs[PLAIN], x_axis, y_axis)
    for name, arm in arms.items():
        if arm.against == PLAIN and arm.group in SHOWN:
            group, setting = SHOWN[arm.group]
            label = f"{arm.settings[setting]:g}" if setting else arm.label
            points += _points(group, label, runs[name], x_axis, y_axis)
    lines = [plain, *(group for group, setting in SHOWN.values() if setting)]
    return scatter(points, x_axis[1], y_axis[1], lines) if len(points) > 2 else None


def _over_scales(runs: Runs, arms: Mapping[str, Arm], x_axis: Axis, y_axis: Axis) -> Figure | None:
    """Two measures over inference scales, for the arms of the mild regime that have them."""
    shown = {name: arm.label for name, arm in arms.items() if PLAIN in (name, arm.against)}
    points = [
        point for name, label in shown.items() for point in _by_scale(runs[name], label, x_axis, y_axis)
    ]
    return scatter(points, x_axis[1], y_axis[1], list(shown.values())) if points else None


def _by_scale(
    runs: Mapping[int, Mapping[str, float]], group: str, x_axis: Axis, y_axis: Axis, own: str = "x 1"
) -> list[Point]:
    """An arm at every inference scale above 0 that was measured; `own` is the label at scale 1."""
    by_scale: dict[float, dict[int, Mapping[str, float]]] = {}
    for seed, measures in runs.items():
        for scale, values in scale_curve(measures).items():
            by_scale.setdefault(scale, {})[seed] = values
    points = []
    for scale, found in sorted(by_scale.items()):
        if scale > 0:
            points += _points(group, own if scale == 1 else f"x {scale:g}", found, x_axis, y_axis)
    return points


def _points(
    group: str, label: str, runs: Mapping[int, Mapping[str, float]], x_axis: Axis, y_axis: Axis
) -> list[Point]:
    """The point of some runs by seed; none where fewer than two have both measures."""
    x, y = (_interval(values_of(runs, measure)) for measure, _ in (x_axis, y_axis))
    return [Point(group, label, x, y)] if x and y else []


def _interval(values: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean and ends of its interval, over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    return (statistics.fmean(values.values()), *bootstrap_interval(list(values.values())))
