"""What a run has noted of itself, in its summary, its checkpoints and its adapter's header."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.file import read_facts
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.output.checkpoint import STATE_NAME, read_state
from flatlora_diffusion.output.names import LIVE_HELDOUT, SUMMARY

Curve = list[tuple[int, float]]
"""Pairs (number of optimizer steps done, value), in order."""

# What a page is given of a summary and of an adapter's header, where it has the type that was written.
NUMBER = (int, float)
HEADER_KINDS = {
    "method": str,
    "rank": int,
    "alpha": NUMBER,
    "targets": dict,
    "steps": int,
    "versions": dict,
}
_SUMMARY_KINDS = {
    "method": str,
    "images": int,
    "mean_loss_of_last_tenth": NUMBER,
    "mean_update_norm": NUMBER,
    "median_seconds_a_step": (*NUMBER, type(None)),
    "peak_memory_bytes": int,
    "peak_memory_of": str,
    "device": str,
    "processes": int,
    "versions": dict,
}


@dataclass
class History:
    """What a run has noted of itself.

    Attributes:
        source: The file that says so.
        losses: Of every step.
        heldout: Of the held-out images.
        heldout_live: The same of the adapter itself, where `heldout` is of its average: of folds alone.
        settings: By name.
        measured: The other facts, by name.
    """

    source: Path
    losses: Curve
    heldout: Curve
    settings: dict[str, Any]
    measured: dict[str, Any]
    heldout_live: Curve = field(default_factory=list)

    def goes_on_after(self, summary: History) -> bool:
        """Whether this is of a run that was taken up again after its summary had been written.

        A longer run that had the folder before left checkpoints of more steps too, but older ones.
        """
        more = len(self.losses) > len(summary.losses)
        return more and self.source.stat().st_mtime_ns > summary.source.stat().st_mtime_ns


def from_summary(folder: Path) -> History:
    """The history in the summary of a run that has ended.

    Raises:
        UserError: It cannot be read, or isn't what was written.
    """
    path = folder / SUMMARY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return History(
            path,
            _curve(enumerate(content["losses"], start=1)),
            _curve(content["heldout_losses"].items()),
            dict(content["settings"]),
            _well_typed(content, _SUMMARY_KINDS),
            _curve(content.get(LIVE_HELDOUT, {}).items()),
        )
    except OSError as error:
        raise UserError(f"{SUMMARY} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{SUMMARY} is not what was written") from error


def from_checkpoint(folder: Path) -> History:
    """The history in a checkpoint; its tensors, which may be large, are not read.

    Raises:
        UserError: It cannot be read, or isn't what was written.
    """
    try:
        state = read_state(folder)
        return History(
            folder / STATE_NAME,
            _curve(enumerate(state["scalars"]["losses"], start=1)),
            _curve(state["scalars"]["heldout_losses"].items()),
            state["settings"],
            _well_typed(state["settings"], {"processes": int}),
        )
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder.name}: {STATE_NAME} is not what was written") from error


def header_facts(file: Path) -> dict[str, Any]:
    """The facts in an adapter's header: other people's files may hold anything there.

    Raises:
        UserError: The file is damaged, or says nothing that this trainer has written.
    """
    try:
        facts = read_facts(file)
    except UserError as error:
        raise UserError(f"{file.name} is not a sound safetensors file") from error
    if not facts:
        raise UserError(f"{file.name} says nothing of its making: it is not of this trainer")
    try:
        _well_typed(facts, HEADER_KINDS)
        return dict(facts)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.name}: the facts in its header are not what was written") from error


def _well_typed(content: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What `content` has of these names; a TypeError where one is of another type."""
    known = {name: content[name] for name in kinds if name in content}
    for name, value in known.items():
        if not isinstance(value, kinds[name]):
            raise TypeError(f"{name} {value!r}")
    return known


def _curve(values: Iterable[tuple[int | str, Any]]) -> Curve:
    """Pairs of a step and a number, in order; a ValueError or TypeError where they are something else."""
    curve = []
    for step, value in values:
        if not isinstance(value, NUMBER):
            raise TypeError(f"{value!r} is not a number")
        curve.append((int(step), float(value)))
    return sorted(curve)
