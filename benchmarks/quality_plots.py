"""The plots of a benchmark with many arms: plain data in, figures out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from flatlora_diffusion.evaluate.figures import (
    COLOURS,
    INK,
    MUTED,
    legend_beside,
    look,
    new_figure,
    place_labels,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETTER, WORSE = COLOURS[:2]


@dataclass(frozen=True)
class Difference:
    """An arm against the one that it is compared with, over the same seeds.

    Attributes:
        group: Neighbours of the same group stand under one heading.
        label: Of the arm.
        mean: Of the paired differences.
        low: End of their interval.
        high: Its other end.
        n: How many seeds.
    """

    group: str
    label: str
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Point:
    """An arm in two measures: (mean, low, high) each. Points of a group have a colour in common."""

    group: str
    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """A measure over sigma under one schedule of the noise: (mean, low, high) at each sigma."""

    label: str
    sigmas: Sequence[float]
    values: Sequence[tuple[float, float, float]]


@style()
def forest(rows: Sequence[Difference], title: str, unit: str) -> Figure:
    """Paired differences with their intervals, one below the other; less is better.

    An interval that doesn't reach zero has the colour of better or worse.

    Args:
        rows: In order, those of a group together.
        title: What was measured.
        unit: Of the differences.
    """
    figure, ((axes,),) = new_figure(1.3 + 0.235 * (len(rows) + 1.4 * len({row.group for row in rows})))
    beside = axes.get_yaxis_transform()
    greatest = max(max(abs(row.low), abs(row.high)) for row in rows)
    # Three digits of the greatest number, and as many decimals of the others.
    digits = max(0, 2 - math.floor(math.log10(greatest))) if 0 < greatest < math.inf else 0
    places: dict[float, str] = {}
    place = 0.0
    for group, members in groupby(rows, key=lambda row: row.group):
        place += 0.4
        axes.text(-0.02, place, group, transform=beside, ha="right", va="center", fontweight="bold")
        for row in members:
            place += 1
            places[place] = row.label
            colour = BETTER if row.high < 0 else WORSE if row.low > 0 else MUTED
            # Bootstrap intervals needn't be symmetric, nor contain the mean of few seeds.
            axes.plot([row.low, row.high], [place, place], color=colour, solid_capstyle="butt")
            axes.plot(row.mean, place, "o", color=colour)
            numbers = ", ".join(f"{end:+.{digits}f}" for end in (row.low, row.high))
            text = f"{row.mean:+.{digits}f}  [{numbers}]  n={row.n}"
            axes.text(
                1.02,
                place,
                text.replace("-", "\N{MINUS SIGN}"),
                transform=beside,
                va="center",
                fontsize=8,
                color=colour,
            )
        place += 1
    axes.set_ylim(place - 0.4, -0.3)
    axes.set_yticks(list(places), list(places.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(f"← better      difference, {unit}      worse →")
    axes.set_title(title)
    return figure


@style()
def scatter(points: Sequence[Point], x_label: str, y_label: str, connected: Collection[str] = ()) -> Figure:
    """Arms as labelled points with intervals in both measures.

    Args:
        points: The arms.
        x_label: The first measure.
        y_label: The second one.
        connected: Groups whose points have a line through them, in their order.
    """
    figure, ((axes,),) = new_figure(6.5)
    groups = list(dict.fromkeys(point.group for point in points))
    handles, intervals = {}, []
    for point in points:
        (x, *x_ends), (y, *y_ends) = point.x, point.y
        appearance = look(groups.index(point.group) + 1)
        faint = {"color": appearance["color"], "alpha": 0.4, "linewidth": 1.2, "zorder": 1.5}
        for line in ((x_ends, (y, y)), ((x, x), y_ends)):
            axes.plot(*line, **faint)
            intervals.append(line)
        (handles[point.group],) = axes.plot(x, y, **appearance | {"linestyle": ""}, label=point.group)
    for place, group in enumerate(groups):
        if group in connected:
            line = [(point.x[0], point.y[0]) for point in points if point.group == group]
            axes.plot(*zip(*line, strict=True), color=look(place + 1)["color"], linewidth=1.2, zorder=1.6)
    axes.margins(0.06)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    legend_beside(figure, list(handles.values()))
    places = [(point.x[0], point.y[0]) for point in points]
    place_labels(axes, places, [point.label for point in points], intervals, fontsize=7.5)
    return figure


@style()
def curves(series: Sequence[Series], y_label: str, plain: float) -> Figure:
    """A measure over sigma with its intervals, a curve a schedule.

    Args:
        series: The curves; their sigmas are above 0.
        y_label: The measure with its unit.
        plain: Its value for plain LoRA: 0 where `series` has differences to it.
    """
    from matplotlib.ticker import NullLocator
    from matplotlib.transforms import ScaledTranslation

    figure, ((axes,),) = new_figure(4)
    drawn = [axes.axhline(plain, color=MUTED, linewidth=1.2, label="plain LoRA")]
    axes.set_xscale("log")
    for place, one in enumerate(series):
        means, lows, highs = zip(*one.values, strict=True)
        appearance = look(place + 1)
        # A little to the side, so that the intervals of two curves don't lie on each other.
        aside = ScaledTranslation((place - (len(series) - 1) / 2) * 4 / 72, 0, figure.dpi_scale_trans)
        transform = axes.transData + aside
        axes.vlines(one.sigmas, lows, highs, color=appearance["color"], linewidth=1.2, transform=transform)
        drawn += axes.plot(one.sigmas, means, **appearance, label=one.label, transform=transform)
        axes.update_datalim([(x, y) for x, *ys in zip(one.sigmas, lows, highs, strict=True) for y in ys])
    axes.autoscale_view()
    sigmas = sorted({sigma for one in series for sigma in one.sigmas})
    axes.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sigma of the training noise")
    axes.set_ylabel(y_label)
    legend_beside(figure, drawn)
    return figure
