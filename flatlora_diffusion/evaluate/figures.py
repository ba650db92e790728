"""How plots look, whatever they show: one style, colours that colour-blind people can tell apart, labels."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.common.files import write_atomically

if TYPE_CHECKING:  # matplotlib is an extra: nothing but drawing needs it
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation


DPI = 200  # 8.5 inches are 1,700 pixels: twice the width of a README
WIDTH = 8.5
INK = "#222222"
MUTED = "#6e6e6e"
RULE = "#e3e3e3"
# Okabe and Ito's palette; the base has its grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
_STYLE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names are names, whatever signs they have
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelspacing": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in this project's style, whatever the user's own is; matplotlib's settings are restored after it.

    It is a decorator too.

    Raises:
        UserError: matplotlib is not installed.
    """
    import_extra("matplotlib", "drawing plots")
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **subplots: Any) -> tuple[Figure, np.ndarray]:
    """A figure that pyplot knows nothing of, and its axes (rows x columns).

    Args:
        height: In inches; the width is `WIDTH`.
        rows: Of axes.
        columns: Of axes.
        subplots: For `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)  # measures texts, before anything is drawn
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine), "figures are made under this project's style"
    layout.set(w_pad=0.08, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of a method, for `Axes.plot`.

    Args:
        index: Its place among the methods; the base has 0, and grey.
    """
    turn, place = divmod(index - 1, len(COLOURS))
    return {
        "color": COLOURS[place] if index else MUTED,
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", ":")[turn % 3] if index else "-",
    }


def wrapped(text: str, width: int = 22) -> str:
    """A label in lines of at most so many characters, broken at spaces, hyphens and underscores."""
    lines = textwrap.wrap(text.replace("_", "_ "), width)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def legend_beside(figure: Figure, handles: Sequence[Artist]) -> None:
    """Name what is drawn to the right of the axes, where it covers nothing."""
    labels = [wrapped(str(handle.get_label())) for handle in handles]
    figure.legend(handles, labels, loc="outside right upper")


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    avoid: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    *,
    drop: bool = False,
    **text: Any,
) -> list[Annotation]:
    """Write a label at each point, where it covers neither another label nor what is drawn.

    Each label takes the place near its point that overlaps least; when all have one, they choose again, now
    that they know each other. A label far from its point gets a line to it. The limits of the axes must be
    set.

    Args:
        axes: Of a figure in its final shape.
        points: In the axes' units; finite.
        texts: One for each point.
        avoid: Polylines (x, y) in the axes' units, beside the points themselves.
        drop: Leave out the labels that find no free place beside their points.
        text: For `Axes.annotate`.
    """
    figure = cast("Figure", axes.figure)  # nothing here has figures in figures
    figure.draw_without_rendering()  # the layout decides where the points are
    point = figure.dpi / 72
    anchors = axes.transData.transform(np.reshape(points, (-1, 2)))
    labels = [
        axes.annotate(
            words,
            place,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            in_layout=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            **text,
        )
        for place, words in zip(points, texts, strict=True)
    ]
    extents = [label.get_window_extent() for label in labels]
    halves = np.reshape([(box.width / 2 + point, box.height / 2) for box in extents], (-1, 2))
    drawn = [anchors, *(_dots(axes.transData.transform(np.column_stack(line))) for line in avoid)]
    boxes = np.concatenate([np.hstack([dots - 3 * point, dots + 3 * point]) for dots in drawn])
    frame = np.reshape(axes.get_window_extent().extents, (1, 4))

    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    ways = np.column_stack([np.cos(angles), np.sin(angles)])
    radii = np.repeat(np.array([5, 9, 15, 24, 36, 50, 66, 84]) * point, len(ways))
    ways = np.tile(ways, (len(radii) // len(ways), 1))
    moves = [ways * (radii[:, None] + half) for half in halves]
    places = [
        np.hstack([anchor + move - half, anchor + move + half])
        for anchor, move, half in zip(anchors, moves, halves, strict=True)
    ]
    # Points and lines may be touched, other labels not; what leaves the frame would cover the axes' texts.
    fixed = [
        _overlap(place, boxes) + 2 * (np.prod(2 * half) - _overlap(place, frame))
        for place, half in zip(places, halves, strict=True)
    ]
    own = np.full((len(labels), 4), np.nan)  # nowhere yet
    offsets, overlaps = np.zeros((len(labels), 2)), np.zeros(len(labels))
    for _ in range(3):
        for index in range(len(labels)):
            own[index] = np.nan
            overlap = fixed[index] + 5 * _overlap(places[index], own)
            best = np.argmin(overlap + (radii / point) ** 1.5)
            own[index], offsets[index], overlaps[index] = (
                places[index][best],
                moves[index][best],
                overlap[best],
            )
    for label, offset, half, overlap in zip(labels, offsets, halves, overlaps, strict=True):
        label.set_position(tuple(offset / point))
        is_near = bool(np.all(np.abs(offset) < half + 10 * point))
        assert label.arrow_patch is not None  # it was made with `arrowprops`
        label.arrow_patch.set_visible(not is_near)
        if drop and (not is_near or overlap > 0.15 * np.prod(2 * half)):
            label.remove()
    return [label for label in labels if label.axes is not None]


def _dots(corners: np.ndarray) -> np.ndarray:
    """Points along a polyline in pixels, close enough together that nothing fits between."""
    corners = corners[np.isfinite(corners).all(axis=1)]
    steps = [
        np.linspace(one, other, 2 + int(np.hypot(*(other - one)) // 6))
        for one, other in itertools.pairwise(corners)
    ]
    return np.concatenate(steps or [corners])


def _overlap(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The area that each place (x0, y0, x1, y1) shares with the boxes, together; a box of nan has none."""
    lows = np.maximum(places[:, None, :2], boxes[None, :, :2])
    highs = np.minimum(places[:, None, 2:], boxes[None, :, 2:])
    return np.nan_to_num(np.clip(highs - lows, 0, None)).prod(-1).sum(-1)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the same figure gives the same file.

    Raises:
        UserError: It cannot be written.
    """
    drawn, file = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(drawn, format="png", dpi=DPI)
    # 256 colours are enough for lines and levels, and make the file a third of its size.
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(file, "png", optimize=True, dpi=(DPI, DPI))
    write_atomically(path, file.getvalue())
