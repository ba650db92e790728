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
from flatlora_diffusion.measure.figures import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORESTS = {
    "heldout_loss": "Loss on held-out icons of the taught style",
    "retention_loss": "Loss on icons of the base's own styles",
    "rise_0.1": "Rise of the training loss under noise (sigma 0.1)",
}
HELDOUT = "loss on held-out icons of the style  (better is lower)"
SCATTERED = {
    "style-against-retention": (
        ("heldout_loss", HELDOUT),
        ("retention_loss", "loss on the base's own styles  (better is lower)"),
    ),
    "flatness-against-style": (
        ("rise_0.1", "rise of the training loss under noise, sigma 0.1  (flatter is lower)"),
        ("heldout_loss", HELDOUT),
    ),
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
    return curves(series, "change of the rise of the loss under noise, %", 0) if series else None


def _scattered(
    runs: Runs, arms: Mapping[str, Arm], x_axis: tuple[str, str], y_axis: tuple[str, str]
) -> Figure | None:
    """The arms of the mild regime, and plain LoRA at other inference scales, in two measures with labels."""
    (x_measure, x_label), (y_measure, y_label) = x_axis, y_axis
    points = []
    for name, arm in arms.items():
        if name == PLAIN or arm.against == PLAIN:
            x, y = (_interval(values_of(runs[name], measure)) for measure in (x_measure, y_measure))
            if x and y:
                points.append(Point(arm.group, arm.label, x, y))
    by_scale: dict[float, dict[int, Mapping[str, float]]] = {}
    for seed, measures in runs[PLAIN].items():
        for scale, values in scale_curve(measures).items():
            if 0 < scale != 1:
                by_scale.setdefault(scale, {})[seed] = values
    for scale, found in sorted(by_scale.items()):
        x, y = (_interval(values_of(found, measure)) for measure in (x_measure, y_measure))
        if x and y:
            points.append(Point("LoRA at other scales", f"x {scale:g}", x, y))
    return scatter(points, x_label, y_label) if points else None


def _interval(values: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean and ends of its interval, over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    return (statistics.fmean(values.values()), *bootstrap_interval(list(values.values())))
