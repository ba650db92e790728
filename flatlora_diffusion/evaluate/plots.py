"""The plots of an evaluation: each takes its report, and draws nothing where that lacks what it shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flatlora_diffusion.evaluate.figures import (
    INK,
    MUTED,
    WIDTH,
    legend_beside,
    look,
    new_figure,
    place_labels,
    style,
    wrapped,
    write_png,
)
from flatlora_diffusion.evaluate.report import band_name, base_name, find, parts, shown_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Report = dict[str, Any]
PANELS_PER_ROW = 4
LEVELS = 12  # of a surface, about


def _index(report: Report, name: str) -> int:
    return list(report["methods"]).index(name)


@style()
def bands(report: Report) -> Figure | None:
    """How much each method changes the base's held-out loss, in percent, by timestep band."""
    losses = parts(report, "heldout", "bands")
    base = losses.pop(base_name(report), None)
    if not base or not losses:
        return None
    figure, ((axes,),) = new_figure(4)
    width = 0.8 / len(losses)
    bars = []
    for place, (name, own) in enumerate(losses.items()):
        changes = [100 * (a["loss"] / b["loss"] - 1) for a, b in zip(own, base, strict=True)]
        centres = np.arange(len(base)) + (place - (len(losses) - 1) / 2) * width
        colour = look(_index(report, name))["color"]
        bars.append(axes.bar(centres, changes, 0.92 * width, color=colour, label=name))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(base)), [band_name(band) for band in base])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("timesteps (noise grows to the right)")
    axes.set_ylabel("change against the base, %  (← better)")
    axes.set_title("Denoising loss on held-out icons")
    legend_beside(figure, bars)
    return figure


@style()
def rise(report: Report) -> Figure | None:
    """The expected rise of the loss under noise over sigma, and the same by sigma squared."""
    rises = parts(report, "flatness", "rise")
    if not any(rises.values()):
        return None
    figure, ((left, right),) = new_figure(3.9, columns=2, sharex=True)
    bars = []
    for name, points in rises.items():
        sigmas, means, errors = (
            np.array([point[key] for point in points]) for key in ("sigma", "rise", "standard_error")
        )
        appearance = look(_index(report, name)) | {"label": name}
        bars.append(left.errorbar(sigmas, means, errors, **appearance))
        # To the second order the rise is a multiple of sigma squared: so small sigmas can be read as well.
        right.errorbar(sigmas, means / sigmas**2, errors / sigmas**2, **appearance)
    left.set_title("Rise of the loss under noise")
    left.set_ylabel(f"rise of the loss on the {shown_pictures(report)}  (← flatter)")
    right.set_title("The same, divided by sigma²", fontweight="normal")
    right.set_ylabel("rise / sigma²  (← flatter)")
    is_a_rise = all(p["rise"] >= p["standard_error"] for points in rises.values() for p in points)
    for axes in (left, right):
        axes.set_xlim(left=0)
        if is_a_rise:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("sigma: noise relative to filter norms")
    legend_beside(figure, bars)
    return figure


@style()
def line(report: Report) -> Figure | None:
    """The loss along random directions: the mean of them, and a band from the least to the greatest."""
    lines = parts(report, "flatness", "line")
    if not lines:
        return None
    figure, ((axes,),) = new_figure(4.2)
    means = []
    for name, own in lines.items():
        losses = np.array(own["losses"])
        appearance = look(_index(report, name)) | {"marker": "", "label": name}
        means += axes.plot(own["alphas"], losses.mean(0), **appearance)
        axes.fill_between(
            own["alphas"], losses.min(0), losses.max(0), color=appearance["color"], alpha=0.13, linewidth=0
        )
    axes.margins(x=0)
    axes.set_xlabel("distance along a random direction, relative to each filter's norm")
    axes.set_ylabel(f"loss on the {shown_pictures(report)}")
    axes.set_title("Loss along random directions: mean, least to greatest")
    legend_beside(figure, means)
    return figure


@style()
def plane(report: Report) -> Figure | None:
    """The loss over a plane of two random directions, a panel a method, all with the same levels."""
    planes = parts(report, "flatness", "plane")
    surfaces = {name: np.array(own["losses"], dtype=float) for name, own in planes.items()}
    finite = [surface[np.isfinite(surface)] for surface in surfaces.values()]
    if not any(len(values) for values in finite):
        return None
    from matplotlib.ticker import MaxNLocator

    least, greatest = np.concatenate(finite).min(), np.concatenate(finite).max()
    levels = MaxNLocator(LEVELS).tick_values(least, greatest)
    rows = math.ceil(len(planes) / PANELS_PER_ROW)
    columns = math.ceil(len(planes) / rows)
    side = (WIDTH - 1.9) / columns - 0.15  # inches
    titles = [wrapped(name, int(11 * side)) for name in planes]
    title = 0.3 + 0.17 * max(text.count("\n") for text in titles)
    figure, grid = new_figure(rows * (side + title) + 0.7, rows, columns)
    figure.set_layout_engine("compressed")  # squares leave gaps otherwise
    for axes in grid.flat[len(planes) :]:
        axes.remove()
    panels = grid.flat[: len(planes)]
    for place, (axes, (name, own), text) in enumerate(zip(panels, planes.items(), titles, strict=True)):
        # The report counts (x, y), matplotlib rows of y and columns of x.
        surface = surfaces[name].T
        filled = axes.contourf(own["alphas"], own["alphas"], surface, levels, cmap="viridis")
        axes.contour(own["alphas"], own["alphas"], surface, levels, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "+", color="white", markersize=8)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.set_title(text, fontsize=10, pad=6)
        axes.tick_params(labelbottom=place + columns >= len(planes), labelleft=place % columns == 0)
    bar = figure.colorbar(filled, ax=panels.tolist(), aspect=25 * rows, pad=0.02)
    bar.set_label(f"loss on the {shown_pictures(report)}")
    bar.outline.set_visible(False)
    figure.supxlabel("first random direction, relative to each filter's norm", fontsize=9.5)
    figure.supylabel("second direction", fontsize=9.5)
    return figure


@style()
def tradeoff(report: Report) -> Figure | None:
    """Style against retention: a curve a method over scales; those of plain LoRA begin at the base."""
    curves = {
        name: points
        for name, points in parts(report, "tradeoff").items()
        if any("retention_loss" in point for point in points)
    }
    base = report["methods"][base_name(report)]
    curves.pop(base_name(report), None)
    if not curves:
        return None
    from matplotlib.lines import Line2D

    figure, ((axes,),) = new_figure(5)
    drawn, places, scales = [], [], []
    for name, points in curves.items():
        xs, ys = ([point[key] for point in points] for key in ("heldout_loss", "retention_loss"))
        appearance = look(_index(report, name)) | {"label": name}
        drawn += axes.plot(xs, ys, markersize=4, **appearance)
        whole = [place for place, point in enumerate(points) if math.isclose(point["scale"], 1)]
        if whole:
            axes.plot(
                *([values[place] for place in whole] for values in (xs, ys)),
                **appearance | {"label": "", "linestyle": ""},
                markersize=10,
                markeredgecolor=INK,
                markeredgewidth=1.2,
                zorder=4,
            )
        for place, point in enumerate(points):
            # What curves start from, and large markers, are known.
            is_drawn = math.isfinite(xs[place]) and math.isfinite(ys[place])
            if is_drawn and point["scale"] and place not in whole:
                places.append((xs[place], ys[place]))
                scales.append(f"{point['scale']:g}")
    start = [find(base, "heldout", "loss"), find(base, "retention", "loss")]
    keys = list(drawn)
    if None not in start:
        keys = (
            axes.plot(
                *([value] for value in start),
                **look(0) | {"linestyle": "", "label": base_name(report)},
                markersize=9,
                zorder=4,
            )
            + keys
        )
    keys.append(
        Line2D(
            *([], []),
            linestyle="",
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=INK,
            label="scale 1; small numbers are the scales",
        )
    )
    axes.margins(0.08)
    axes.set_xlabel("loss on held-out icons of the style  (← better)")
    axes.set_ylabel("loss on the base's own styles  (← better)")
    axes.set_title("Style against retention over the adapter's scale")
    legend_beside(figure, keys)
    place_labels(axes, places, scales, [c.get_data() for c in drawn], drop=True, fontsize=7.5, color=MUTED)
    return figure


PLOTS = {
    "bands.png": bands,
    "rise.png": rise,
    "line.png": line,
    "plane.png": plane,
    "tradeoff.png": tradeoff,
}


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write what can be drawn of a report as PNG files, each whole or not at all.

    Args:
        report: Of an evaluation: see `evaluate.report`.
        folder: Must exist.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    figures = {folder / name: draw(report) for name, draw in PLOTS.items()}
    written = {path: figure for path, figure in figures.items() if figure is not None}
    for path, figure in written.items():
        write_png(figure, path)
    return list(written)
