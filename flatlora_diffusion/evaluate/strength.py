"""Which scale to draw an adapter with: the rule, over the trade-off of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flatlora_diffusion.adapter.strength import Strength

HELDOUT, RETENTION = "heldout_by_picture", "retention_by_picture"
"""What a point of the trade-off calls the losses of each picture, beside their means."""

NOISE = 2.0
"""Standard errors that a difference must exceed: about 95% of those that are none stay below."""


def recommend(points: Sequence[Mapping[str, Any]]) -> Strength | None:
    """The scale at which an adapter is best drawn with.

    Every scale s is compared with 1, picture by picture, by the mean losses l_i of the n pictures of a kind:

        change(s) = mean_i(d_i) / mean_i(l_i(1)),    d_i = l_i(s) - l_i(1)
        error(s)  = std_i(d_i) / (sqrt(n) mean_i(l_i(1)))

    with n - 1 degrees of freedom; one picture alone tells nothing. A scale is better than 1 where neither the
    change on held-out pictures of the style nor that on the base's own styles is above 0, and one of them is
    below 0 by more than `NOISE` errors. Of these scales style decides: the one with the lowest loss on
    held-out pictures, of equal ones the nearest to 1. Where there is none, 1 is as good. 0 is the base, and
    no scale to draw an adapter with.

    Args:
        points: Of `report["methods"][...]["tradeoff"]`, see `evaluate.report`.

    Returns:
        None where the losses of single pictures, or those at 1, aren't known.
    """
    one = next((point for point in points if math.isclose(point["scale"], 1)), None)
    if one is None or any(not _losses(point, HELDOUT).size for point in points):
        return None
    candidates = [_compared(point, one) for point in points if point["scale"] > 0]
    better = [own for own in candidates if _is_better(own)]
    none = 0.0 if RETENTION in one else None
    as_it_is = Strength(1.0, 0.0, 0.0, none, none, len(one[HELDOUT]))
    return min(better, key=lambda own: (own.heldout, abs(own.scale - 1)), default=as_it_is)


def _compared(point: Mapping[str, Any], one: Mapping[str, Any]) -> Strength:
    heldout, heldout_error = _change(point, one, HELDOUT)
    retention, retention_error = _change(point, one, RETENTION) if RETENTION in one else (None, None)
    pictures = len(one[HELDOUT])
    return Strength(point["scale"], heldout, heldout_error, retention, retention_error, pictures)


def _change(point: Mapping[str, Any], one: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """Mean and standard error of the change of a loss, relative to the loss at scale 1."""
    before = _losses(one, kind)
    changes = (_losses(point, kind) - before) / before.mean()
    error = changes.std(ddof=1) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return float(changes.mean()), float(error)


def _losses(point: Mapping[str, Any], kind: str) -> np.ndarray:
    return np.array(point.get(kind, ()), dtype=float)  # None, which a report has for infinities, becomes nan


def _is_better(own: Strength) -> bool:
    changes = [(own.heldout, own.heldout_error)]
    if own.retention is not None and own.retention_error is not None:
        changes.append((own.retention, own.retention_error))
    return all(change <= 0 for change, _ in changes) and any(
        change < -NOISE * error for change, error in changes
    )
