"""Plain LoRA at the point where it costs as much as another arm: is a win only a smaller update?

Whoever wants less change of the base can draw with plain LoRA at a smaller scale, or train it for fewer
steps. So an arm that forgets less has won something only if its held-out loss is below that of plain LoRA at
the scale (or number of steps) where that forgets just as little; the same goes for equal training loss.

Equal training loss has a limit: over inference scales, plain LoRA's own has its minimum near scale 1. So
matching by it drops the seeds whose arm has a lower training loss than plain LoRA at any scale, which selects
by outcome; it moves the scale by the square root of a tiny excess; and it takes the better of two crossings:
plain LoRA's scale is tuned to the arm, and the arm's isn't. An arm that equals plain LoRA but for chance
looks worse there, so a held-out loss that is a few tenths of a percent higher at equal training loss says
nothing against an arm. Retention loss and drift have no such minimum.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.quality_arms import MILD, Arm
from benchmarks.quality_measures import Compared, Runs, compare, values_of

Curve = Mapping[float, Mapping[str, float]]
"""Inference scale, or number of steps -> name of a measure -> its value there, of one run or one seed."""

_OF_SCALE = re.compile(r"scale_(\d+(?:\.\d+)?)_([\w.]+)")
_GRID = 1201
_LEAST_STEPS_POINTS = 4  # of a curve over numbers of steps
_SAME = 1e-3  # relative difference of one loss measured in two places


@dataclass(frozen=True)
class Match:
    """A column of the comparison with plain LoRA at another scale or number of steps.

    Attributes:
        held: The measure that is equal there.
        measure: The one that is compared.
        along: What is chosen so: the inference scale, or the number of steps.
        label: In the table's head.
        better: -1 where a lower value of `measure` is better, 1 where a higher one is.
    """

    held: str
    measure: str
    along: str
    label: str
    better: int = -1


MATCHES = (
    Match("retention_loss", "heldout_loss", "scale", "held-out loss at equal retention loss"),
    Match("train_loss", "heldout_loss", "scale", "held-out loss at equal training loss"),
    Match("train_loss", "rise_0.1", "scale", "rise under noise (sigma 0.1) at equal training loss"),
    Match("retention_loss", "drift", "scale", "drift at equal retention loss"),
    Match("drift", "clip_i", "scale", "CLIP-I at equal drift", better=1),
    Match("retention_loss", "heldout_loss", "steps", "held-out loss at equal retention loss"),
)


@dataclass(frozen=True)
class Point:
    """Where a curve has a wanted value.

    Attributes:
        position: Inference scale, or number of steps.
        value: Of the other measure there.
    """

    position: float
    value: float


def scale_curve(measures: Mapping[str, float]) -> dict[float, dict[str, float]]:
    """A run's curve over inference scales, from `scale_0.4_heldout_loss` and the like among its measures."""
    curve: dict[float, dict[str, float]] = {}
    for name, value in measures.items():
        if match := _OF_SCALE.fullmatch(name):
            curve.setdefault(float(match[1]), {})[match[2]] = value
    return curve


def matched(
    curve: Curve,
    held: str,
    target: float,
    measure: str,
    between: Literal["smooth", "straight"],
    better: int = -1,
) -> Point | None:
    """Where the curve has the value `target` of the measure `held`, and the other measure there.

    Where it has that value several times, the point with the best value of the other measure counts: the best
    that plain LoRA can do at this price.

    Args:
        curve: Of the plain arm.
        held: The measure that is to be equal.
        target: Its value for the other arm.
        measure: The one that is compared.
        between: How the curve goes between its points: `smooth` is the polynomial through all of them (losses
            at fixed timesteps and noise are smooth in the scale), `straight` lines are for points of several
            runs (chords of a convex curve are above it: they flatter the arm that is compared).
        better: -1 where a lower value of the other measure is better, 1 where a higher one is.

    Returns:
        None where the curve doesn't reach that value, or has fewer than two points with both measures.
    """
    positions = np.array(sorted(p for p, values in curve.items() if held in values and measure in values))
    if len(positions) < 2:
        return None
    ours, others = (np.array([curve[p][name] for p in positions]) for name in (held, measure))
    if between == "smooth":
        grid = np.union1d(np.linspace(positions[0], positions[-1], _GRID), positions)
        ours, others = (_smooth(positions, values, grid) for values in (ours, others))
        positions = grid
    points = []
    for start in range(len(positions) - 1):
        low, high = ours[start : start + 2]
        if not min(low, high) <= target <= max(low, high):
            continue
        share = (target - low) / (high - low) if high != low else 0.0
        points.append(
            Point(
                float(positions[start] + share * (positions[start + 1] - positions[start])),
                float(others[start] + share * (others[start + 1] - others[start])),
            )
        )
    return max(points, key=lambda point: better * point.value, default=None)


def _smooth(positions: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The polynomial through some points, on a grid that has their positions in it."""
    smooth = np.polynomial.Polynomial.fit(positions, values, len(positions) - 1)(grid)
    smooth[np.searchsorted(grid, positions)] = values  # without rounding: the ends count as reached
    return smooth


def compare_matched(
    runs: Runs, compared: Mapping[str, Arm], arms: Mapping[str, Arm]
) -> tuple[dict[Match, dict[str, Compared | None]], list[str]]:
    """Every arm against its plain twin at the scale, or number of steps, that costs that one as much.

    The point is looked for seed by seed, and the differences are paired. Seeds in which plain LoRA reaches
    that loss at no scale (or number of steps) are left out.

    Args:
        runs: What was measured.
        compared: The arms, by name, that have a plain twin.
        arms: All of them.

    Returns:
        For each kind of comparison name -> result, None where fewer than two seeds have one; and a line for
        each run whose curve doesn't go through its own measures.
    """
    curves: dict[str, dict[str, dict[int, Curve]]] = {"scale": {}, "steps": {}}
    problems = []
    for plain in dict.fromkeys(arm.against for arm in compared.values()):
        by_scale = {seed: scale_curve(measures) for seed, measures in runs[plain].items()}
        for seed, curve in by_scale.items():
            problems += [
                f"{plain} seed {seed}: {problem}" for problem in _drop_unlike(curve, runs[plain][seed])
            ]
        by_steps = {
            seed: _steps_curve(runs, arms, plain, seed, curve.get(0.0)) for seed, curve in by_scale.items()
        }
        curves["scale"][plain], curves["steps"][plain] = by_scale, by_steps
    results: dict[Match, dict[str, Compared | None]] = {match: {} for match in MATCHES}
    for match, (name, arm) in itertools.product(MATCHES, compared.items()):
        if match.along == "steps" and _is_shorter(arm, arms[arm.against]):
            continue  # it is a point of that very curve
        results[match][name] = _matched_difference(match, runs[name], curves[match.along][arm.against])
    return results, problems


def _matched_difference(
    match: Match, ours: Mapping[int, Mapping[str, float]], curves: Mapping[int, Curve]
) -> Compared | None:
    points: dict[int, Point] = {}
    for seed, measures in ours.items():
        if seed in curves and match.held in measures and match.measure in measures:
            between = "smooth" if match.along == "scale" else "straight"
            point = matched(
                curves[seed], match.held, measures[match.held], match.measure, between, match.better
            )
            if point:
                points[seed] = point
    found = compare(values_of(ours, match.measure), {seed: point.value for seed, point in points.items()})
    if found is None:
        return None
    position = statistics.fmean(point.position for point in points.values())
    return Compared(found.difference, found.plain, position)


def _drop_unlike(curve: dict[float, dict[str, float]], measures: Mapping[str, float]) -> list[str]:
    """Take out of a run's curve what isn't the run's own measure at scale 1; a line for each."""
    problems = []
    for name, value in list(curve.get(1.0, {}).items()):
        if name in measures and not math.isclose(measures[name], value, rel_tol=_SAME):
            problems.append(
                f"{name} is {measures[name]:.4g}, but {value:.4g} at scale 1: the two were measured in "
                "different ways, so its values at other scales are not used"
            )
            for values in curve.values():
                values.pop(name, None)
    return problems


def _is_shorter(arm: Arm, plain: Arm) -> bool:
    """Whether an arm is the plain one after fewer steps."""
    steps = {"max_train_steps": 0}
    same = arm.settings | steps == plain.settings | steps and arm.few_icons == plain.few_icons
    return same and arm.rival is None


def _steps_curve(
    runs: Runs, arms: Mapping[str, Arm], plain: str, seed: int, base: Mapping[str, float] | None
) -> Curve:
    """The measures of the plain arm and of those that stop earlier; {} where there are too few of them."""
    curve: dict[float, Mapping[str, float]] = {0.0: base} if base else {}
    for name, arm in arms.items():
        is_point = name == plain or (arm.against == plain and _is_shorter(arm, arms[plain]))
        if is_point and seed in runs[name]:
            curve[float((MILD | arm.settings)["max_train_steps"])] = runs[name][seed]
    return curve if len(curve) >= _LEAST_STEPS_POINTS else {}
