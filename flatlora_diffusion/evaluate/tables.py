"""Tables in GitHub Markdown, and those of an evaluation's report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flatlora_diffusion.adapter.strength import Strength
from flatlora_diffusion.evaluate.report import band_name, base_name, find, parts, shown_pictures

Report = dict[str, Any]
NOTHING = "-"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column holds names, and whose others hold numbers, aligned in the source as well.

    Args:
        header: Texts of the first line.
        rows: As many cells each; `|` is escaped, and a line break becomes a space.
    """
    lines = [[" ".join(cell.replace("|", r"\|").splitlines()) for cell in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:]))


def significant(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; `-` for none."""
    return NOTHING if value is None else f"{value:#.{digits}g}".rstrip(".")


def decimals(value: float | None, count: int = 3) -> str:
    """A number with so many digits after the point; `-` for none."""
    return NOTHING if value is None else f"{value:.{count}f}"


def change(value: float | None, base: float | None) -> str:
    """By how many percent a value is greater than the base's, with its sign; `-` where one is missing."""
    if value is None or base is None:
        return NOTHING
    return f"{round(value / base - 1, 4) + 0.0:+.2%}"  # adding 0 takes the sign from -0


def markdown(report: Report) -> str:
    """All tables of a report, as Markdown: the summary, by timestep band, the trade-off over scales.

    Columns and tables that no method has values for are left out.
    """
    texts = [
        "## Summary",
        _summary(report),
        "Arrows say which way is better; changes are against the base. Nearest training icon: the likeness "
        "to it of what was drawn, and of true held-out icons; more than theirs is copying. Rises under "
        f"noise and the top eigenvalue: of the loss on some of the {shown_pictures(report)} at a few "
        "timesteps; rises in percent of that loss.",
    ]
    if left_out := report.get("left_out"):
        texts += ["Left out:", "\n".join(f"- {line}" for line in left_out)]
    if table := _bands(report):
        texts += ["## Held-out loss by timesteps", table]
    if table := _tradeoff(report):
        texts += ["## Style against retention over the adapter's scale", table]
    texts += [Strength(**own).sentence(name) for name, own in parts(report, "recommended").items()]
    return "\n\n".join(texts) + "\n"


def _summary(report: Report) -> str:
    methods = report["methods"]
    base = methods[base_name(report)]
    columns: dict[str, Callable[[Any], str]] = {}

    def column(title: str, cell: Callable[[Any], str], *keys: str) -> None:
        if parts(report, *keys):
            columns[title] = cell

    def loss(title: str, *keys: str) -> None:
        column(title, lambda own: significant(find(own, *keys)), *keys)

    def change_of(title: str, *keys: str) -> None:
        # The base itself has none: 0 would look measured.
        column(
            title, lambda own: NOTHING if own is base else change(find(own, *keys), find(base, *keys)), *keys
        )

    def likeness(title: str, *keys: str) -> None:
        column(title, lambda own: decimals(find(own, *keys)), *keys)

    loss("held-out loss ↓", "heldout", "loss")
    change_of("held-out change ↓", "heldout", "loss")
    loss("training loss", "train_loss")
    likeness("CLIP-I ↑", "clip_i")
    column("nearest training icon ↓ (drawn / true)", _nearest, "nearest_training")
    loss("retention loss ↓", "retention", "loss")
    change_of("retention change ↓", "retention", "loss")
    likeness("CLIP-T ↑", "retention", "clip_t")
    likeness("drift ↓", "retention", "drift")
    sigmas = {point["sigma"] for points in parts(report, "flatness", "rise").values() for point in points}
    for sigma in sorted(sigmas):
        columns[f"rise at sigma {sigma:g} ↓"] = lambda own, sigma=sigma: _rise(own, sigma)
    loss("top eigenvalue ↓", "flatness", "top_eigenvalue")
    rows = [[name, *(cell(own) for cell in columns.values())] for name, own in methods.items()]
    return markdown_table(["method", *columns], rows)


def _nearest(own: Any) -> str:
    drawn, true = (find(own, "nearest_training", key) for key in ("drawn", "true"))
    return NOTHING if drawn is None else f"{decimals(drawn)} / {decimals(true)}"


def _rise(own: Any, sigma: float) -> str:
    points = find(own, "flatness", "rise") or []
    rises = [point["rise"] / own["flatness"]["loss"] for point in points if point["sigma"] == sigma]
    return f"{significant(100 * rises[0], 3)}%" if rises else NOTHING


def _beside_change(value: float | None, base: float | None) -> str:
    """A loss, and in brackets its change against the base."""
    both = value is not None and base is not None
    return f"{significant(value)} ({change(value, base)})" if both else significant(value)


def _bands(report: Report) -> str | None:
    losses = parts(report, "heldout", "bands")
    if not any(losses.values()):
        return None
    base = losses.get(base_name(report))
    rows = []
    for name, own in losses.items():
        known = [None] * len(own) if own is base or not base else [band["loss"] for band in base]
        cells = [_beside_change(band["loss"], other) for band, other in zip(own, known, strict=True)]
        rows.append([name, *cells])
    first = next(iter(losses.values()))
    return markdown_table(["method", *(f"{band_name(band)} ↓" for band in first)], rows)


def _tradeoff(report: Report) -> str | None:
    base = report["methods"][base_name(report)]
    columns = {
        "held-out loss ↓": (
            "heldout_loss",
            lambda value: _beside_change(value, find(base, "heldout", "loss")),
        ),
        "retention loss ↓": (
            "retention_loss",
            lambda value: _beside_change(value, find(base, "retention", "loss")),
        ),
    }
    points = [(name, point) for name, own in parts(report, "tradeoff").items() for point in own]
    there = {
        title: (key, cell)
        for title, (key, cell) in columns.items()
        if any(point.get(key) is not None for _, point in points)
    }
    rows = [
        [name, f"{point['scale']:g}", *(cell(point.get(key)) for key, cell in there.values())]
        for name, point in points
    ]
    return markdown_table(["method", "scale", *there], rows) if rows else None
