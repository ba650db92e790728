"""Tables of what was measured of the runs of `benchmarks.quality`: every arm beside its plain twin.

What is missing is left out and the number of seeds said; what is damaged or out of date is named in a line at
the end.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.matched import Match, compare_matched
from benchmarks.paired import holm
from benchmarks.quality_arms import Arm
from benchmarks.quality_measures import MAIN, OTHERS, Compared, Measure, Runs, compare, read_runs, values_of
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.evaluate.tables import markdown_table

ARROWS = {-1: " ↓", 0: "", 1: " ↑"}
STRENGTHS = (0.1, 0.3)  # of the noise under which the rise is measured
ENOUGH_SEEDS = 5  # with fewer, the intervals are too far from their level for a mark


def report(work: Path, arms: Mapping[str, Arm]) -> str:
    """All tables, in Markdown.

    Args:
        work: The folder with `runs`.
        arms: Name -> arm.

    Raises:
        UserError: No run there has been measured.
    """
    runs, problems = read_runs(work, arms)
    if not any(runs.values()):
        found = f"; {problems[0]}" if problems else ""
        raise UserError(f"--folder {work}: no run there has been measured{found}")
    compared = {name: arm for name, arm in arms.items() if arm.against and runs[name] and runs[arm.against]}
    columns = {
        measure: {
            name: compare(values_of(runs[name], measure.name), values_of(runs[arm.against], measure.name))
            for name, arm in compared.items()
        }
        for measure in (*MAIN, *OTHERS)
    }
    matches, unlike = compare_matched(runs, compared, arms)
    problems += unlike
    everything = itertools.chain(columns.values(), matches.values())
    count = sum(found is not None for column in everything for found in column.values())
    sections = [_preface(len(compared), count)]
    for group in dict.fromkeys(arm.group for arm in arms.values()):
        names = [name for name, arm in arms.items() if arm.group == group and runs[name]]
        if not names:
            continue
        parts = [f"## {group[0].upper()}{group[1:]}", _table(names, arms, runs, columns, MAIN)]
        if any(measure.name in run for measure in OTHERS for name in names for run in runs[name].values()):
            parts.append(_table(names, arms, runs, columns, OTHERS))
        parts.append(_matched_table([name for name in names if name in compared], arms, matches))
        sections.append("\n\n".join(filter(None, parts)))
    sections += [_sharpness_section(arms, runs), _strength_section(arms, runs)]
    missing = [name for name in arms if not runs[name]]
    if missing:
        problems.append(f"not measured: {', '.join(missing)}")
    if problems:
        sections.append("\n".join(["## Left out", "", *(f"- {problem}" for problem in problems)]))
    return "\n\n".join(filter(None, sections)) + "\n"


def _preface(arms: int, count: int) -> str:
    return (
        "# Arms against plain LoRA on the demo base\n\n"
        f"{arms} arms, {count} comparisons. Each is an arm less its plain twin, paired over the seeds that "
        "both have: the mean difference with its 95% bootstrap interval, in % of the plain twin's mean over "
        "those seeds where there is a %. With five seeds such an interval covers the truth in 92% of the "
        "cases (`benchmarks/paired.py` says why).\n\n"
        "*better* or *worse* (*lower* or *higher* where neither is better) marks an interval of at least "
        f"{ENOUGH_SEEDS} seeds that excludes 0. The intervals are not adjusted for their number: if nothing "
        f"had any effect, about {0.08 * count:.0f} of {count} would be marked. A star says that the paired t "
        "test, adjusted by Holm's method for all arms of that column in all tables, finds it at 5% too."
    )


def _table(
    names: list[str],
    arms: Mapping[str, Arm],
    runs: Runs,
    columns: Mapping[Measure, Mapping[str, Compared | None]],
    measures: Iterable[Measure],
) -> str:
    """Plain arms with their means, each followed by the arms that are compared with it."""
    present = [m for m in measures if any(m.name in run for name in names for run in runs[name].values())]
    heads = [f"{m.label}{ARROWS[m.better]}" for m in present]
    stars = {measure: _starred(columns[measure]) for measure in present}
    rows = []
    for plain in dict.fromkeys(arms[name].against or name for name in names):
        if runs[plain]:
            seeds = len(runs[plain])
            cells = [_mean(values_of(runs[plain], measure.name), seeds) for measure in present]
            rows.append([f"**{arms[plain].label}**", str(seeds), *cells])
        for name in names:
            if arms[name].against == plain:
                seeds = len(runs[name].keys() & runs[plain].keys())
                cells = [
                    _cell(columns[m].get(name), m.better, m.relative, name in stars[m], seeds)
                    for m in present
                ]
                rows.append([arms[name].label, str(seeds), *cells])
    return markdown_table(["arm", "seeds", *heads], rows)


def _mean(values: Mapping[int, float], seeds: int) -> str:
    """The mean over seeds; with their number where it isn't that of the row."""
    if not values:
        return ""
    return f"{statistics.fmean(values.values()):.4g}{_of_seeds(len(values), seeds)}"


def _of_seeds(n: int, seeds: int) -> str:
    return "" if n == seeds else f" ({n} seed{'s' if n > 1 else ''})"


def _sharpness_section(arms: Mapping[str, Arm], runs: Runs) -> str:
    """The Hessian's largest eigenvalues by rank, as single runs, by thousands, would decide their means."""
    rows = []
    for name, arm in arms.items():
        values = values_of(runs[name], "top_eigenvalue")
        if not values:
            continue
        ordered = sorted(values.values())
        cells = [f"{value:.4g}" for value in (ordered[0], statistics.median(ordered), ordered[-1])]
        plain = values_of(runs[arm.against], "top_eigenvalue") if arm.against else {}
        shared = values.keys() & plain.keys()
        lower = sum(values[seed] < plain[seed] for seed in shared)
        cells.append(f"{lower} of {len(shared)}" if shared else "")
        rows.append([f"{arm.label}, {arm.group}", str(len(values)), *cells])
    if not rows:
        return ""
    heads = ["arm", "seeds", "least", "median", "greatest", "lower than its plain twin"]
    text = (
        "Of the training loss, with respect to the attention's merged weights, over the seeds of "
        "featured arms. Not among the comparisons above: a single run can have a thousand times the value of "
        "the others."
    )
    return f"## The Hessian's largest eigenvalue\n\n{text}\n\n{markdown_table(heads, rows)}"


def _strength_section(arms: Mapping[str, Arm], runs: Runs) -> str:
    """The noise beside the update and its penalty beside the loss, for plain arms with a Flat-LoRA."""
    measures = ("relative_update", "train_loss", *(f"rise_{sigma}" for sigma in STRENGTHS))
    rows = []
    for name in dict.fromkeys(arm.against for arm in arms.values() if arm.settings.get("flat_sigma")):
        columns = [values_of(runs[name], measure) for measure in measures]
        if not all(columns):
            continue
        update, loss, *rises = (statistics.fmean(values.values()) for values in columns)
        cells = [f"{update:.3f}", *(f"{sigma / update:.2f}" for sigma in STRENGTHS)]
        cells += [f"{100 * rise / loss:.2f}%" for rise in rises]
        rows.append([f"{arms[name].label}, {arms[name].group}", *cells])
    if not rows:
        return ""
    heads = [f"noise of sigma {sigma} / dW" for sigma in STRENGTHS]
    heads += [f"rise at {sigma} / training loss" for sigma in STRENGTHS]
    text = (
        "The length of Flat-LoRA's noise beside that of plain LoRA's update, over all attention weights "
        "together, and how much this noise adds to the loss of plain LoRA's model. Means over the seeds."
    )
    table = markdown_table(["plain arm", "dW / W'", *heads], rows)
    return f"## How strong the noise is\n\n{text}\n\n{table}"


def _matched_table(
    names: list[str], arms: Mapping[str, Arm], matches: Mapping[Match, Mapping[str, Compared | None]]
) -> str:
    """The arms against plain LoRA at another scale or number of steps; empty where nothing was found."""
    present = [match for match in matches if any(matches[match].get(name) for name in names)]
    if not present:
        return ""
    heads = [
        cell for m in present for cell in (f"{m.along} of LoRA", f"{m.label}{ARROWS[m.better]}", "seeds won")
    ]
    stars = {match: _starred(matches[match]) for match in present}
    rows = []
    for name in names:
        cells = []
        for match in present:
            found = matches[match].get(name)
            if found is None:
                cells += ["", "", ""]
                continue
            d = found.difference
            cells += [f"{found.position:.3g}", _cell(found, match.better, True, name in stars[match], d.n)]
            cells.append(f"{d.wins if match.better < 0 else d.n - d.wins} of {d.n}")
        if any(cells):
            rows.append([arms[name].label, *cells])
    title = (
        "Against plain LoRA at the scale, or number of steps, where it has the same loss. At equal training "
        "loss the comparison of losses leans to plain LoRA's side (see `benchmarks/matched.py`):"
    )
    return f"{title}\n\n{markdown_table(['arm', *heads], rows)}"


def _starred(column: Mapping[str, Compared | None]) -> set[str]:
    """The arms whose difference survives the adjustment for all of the column."""
    tested = {name: found.difference.p for name, found in column.items() if found}
    return {name for name, p in zip(tested, holm(list(tested.values())), strict=True) if p <= 0.05}


def _cell(found: Compared | None, better: int, relative: bool, starred: bool, seeds: int) -> str:
    """`-1.20% [-2.00%, -0.40%] better*`; with the number of seeds where it isn't that of the row."""
    if found is None:
        return "-"
    d = found.difference
    show: Callable[[float], str] = "{:+.3g}".format
    if relative and found.plain > 0:

        def show(value: float) -> str:
            return f"{100 * value / found.plain:+.2f}%"

    text = f"{show(d.mean)} [{show(d.low)}, {show(d.high)}]"
    text += _of_seeds(d.n, seeds)
    if d.n < ENOUGH_SEEDS or not d.excludes_zero:
        return text
    words = ("lower", "higher") if not better else ("better", "worse")[::-better]
    return f"{text} {words[d.mean > 0]}{'*' if starred else ''}"
