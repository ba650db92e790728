"""Facts and settings of runs as HTML tables: one row a fact, one column a run."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from flatlora_diffusion.output.reading import is_default

TABLE_CSS = """
.scroll { overflow-x: auto; margin-bottom: var(--spacing-lg); }
.scroll:focus-visible { outline: 2px solid var(--color-accent); }
table { border-collapse: collapse; table-layout: fixed; width: 100%; color: var(--body-text-color); }
caption { text-align: left; font-weight: 600; padding: var(--spacing-md) 0; }
th, td {
  text-align: left; vertical-align: top; padding: var(--spacing-sm) var(--spacing-md);
  border: 1px solid var(--border-color-primary); overflow-wrap: break-word; font-size: var(--text-md);
}
thead th, th[scope="rowgroup"] { background: var(--background-fill-secondary); }
th[scope="row"] { font-weight: 400; }
summary { cursor: pointer; padding: var(--spacing-md) 0; color: var(--body-text-color); font-weight: 600; }
"""

_FACTS = {
    "state": "State",
    "method": "Method",
    "rank": "Rank",
    "alpha": "Alpha",
    "targets": "Layers with a LoRA",
    "images": "Training images",
    "mean_loss_of_last_tenth": "Mean loss of the last tenth",
    "mean_update_norm": "Mean norm of the updates",
    "median_seconds_a_step": "Seconds a step (median)",
    "peak_memory_bytes": "Peak memory",
    "device": "Device",
    "processes": "Processes",
    "versions": "Versions",
    "sha256": "SHA-256 of the adapter",
}
_UNKNOWN = "not known"


def facts_table(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The facts of each run: those that differ between runs first.

    Args:
        facts: Label -> `Reading.facts`.
    """
    rows = {
        title: {label: _shown_fact(name, known) for label, known in facts.items()}
        for name, title in _FACTS.items()
        if any(name in known for known in facts.values())
    }
    return _table("Adapter and run", list(facts), rows) if rows else ""


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings of each run: those that differ between runs first, the defaults of all folded up.

    Args:
        settings: Label -> `Reading.settings`.
    """
    names = list(dict.fromkeys(name for known in settings.values() for name in known))
    given, defaults = {}, {}
    for name in names:
        known = {label: values[name] for label, values in settings.items() if name in values}
        rows = defaults if all(is_default(name, value) for value in known.values()) else given
        rows[name] = {label: _text(known[label]) if label in known else _UNKNOWN for label in settings}
    if not names:
        return ""
    labels = list(settings)
    folded = _table("Settings at their defaults", labels, defaults) if defaults else ""
    return _table("Settings that were given", labels, given) + (
        f"<details><summary>Settings at their defaults ({len(defaults)})</summary>{folded}</details>"
        if defaults
        else ""
    )


def _shown_fact(name: str, facts: Mapping[str, Any]) -> str:
    value = facts.get(name)
    if value is None:
        return _UNKNOWN
    if name == "state":
        return _state(facts)
    if name in ("mean_loss_of_last_tenth", "mean_update_norm", "median_seconds_a_step"):
        return f"{value:.4g}"
    if name == "peak_memory_bytes":
        return f"{value / 2**20:,.0f} MiB of the {facts.get('peak_memory_of', 'process')}"
    if name == "targets":
        return "; ".join(f"{model}: {_text(layers)}" for model, layers in value.items())
    if name == "versions":
        return ", ".join(f"{package} {version}" for package, version in value.items())
    return _text(value)


def _state(facts: Mapping[str, Any]) -> str:
    """Such as `finished, 400 steps`, `unfinished, 200 of 400 steps`."""
    done, total = facts.get("steps"), facts.get("total_steps")
    if done is None:
        return str(facts["state"])
    of_total = f" of {total}" if total is not None and total != done else ""
    return f"{facts['state']}, {done}{of_total} steps"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _table(title: str, labels: list[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    """An HTML table; its cells are text, whatever they hold.

    Args:
        title: Its caption.
        labels: Of the columns.
        rows: Heading of the row -> label -> cell.
    """
    different = {name: row for name, row in rows.items() if len(set(row.values()) - {_UNKNOWN}) > 1}
    same = {name: row for name, row in rows.items() if name not in different}
    groups = {"": rows}
    if len(labels) > 1:
        groups = {"Different between the runs": different, "The same in all runs": same}
    body = "".join(_group(heading, labels, group) for heading, group in groups.items() if group)
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    name = escape(title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">'
        f'<table style="min-width: {7 * (len(labels) + 1)}em"><caption>{name}</caption>'
        f'<thead><tr><th scope="col">Name</th>{head}</tr></thead>{body}</table></div>'
    )


def _group(heading: str, labels: list[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    head = f'<tr><th scope="rowgroup" colspan="{len(labels) + 1}">{heading}</th></tr>' if heading else ""
    cells = "".join(
        f'<tr><th scope="row">{_cell(name)}</th>'
        + "".join(f"<td>{_cell(row[label])}</td>" for label in labels)
        + "</tr>"
        for name, row in rows.items()
    )
    return f"<tbody>{head}{cells}</tbody>"


def _cell(text: str) -> str:
    """The text, which may be broken after the underscores of long names."""
    return escape(text).replace("_", "_<wbr>")
