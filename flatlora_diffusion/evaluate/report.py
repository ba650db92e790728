"""The report of an evaluation, as tables and plots read it.

`report["methods"]` has what was measured of each method by its name, the base first. A part that wasn't asked
for, or couldn't be measured, is missing or None:

    heldout            {"loss", "bands": [{"from", "to", "loss"}, ...]}
    train_loss         of the training pictures
    clip_i             of drawn against true held-out pictures
    nearest_training   {"drawn", "true"}: likeness to the nearest training picture
    retention          {"loss", "clip_t", "drift", "pixel_drift"}: the base's own styles
    flatness           {"loss", "rise": [{"sigma", "rise", "standard_error"}, ...],
                       "line": {"alphas", "losses": one list a direction},
                       "plane": {"alphas", "losses": [i][j] is that at (alphas[i], alphas[j])},
                       "top_eigenvalue": of the Hessian; None, too, where it wasn't found}
    tradeoff           [{"scale", "heldout_loss", "retention_loss"}, ...], the last where there is retention;
                       "heldout_by_picture" and "retention_by_picture": those of which these are the means
    recommended        the scale that this speaks for: see `adapter.strength.Strength`
"""

from __future__ import annotations

from typing import Any


def find(measures: Any, *keys: str) -> Any:
    """A value inside nested dictionaries; None where any of the keys is missing or None."""
    for key in keys:
        if measures is None:
            return None
        measures = measures.get(key)
    return measures


def parts(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Method -> its value under the keys, of the methods that have one."""
    found = {name: find(measures, *keys) for name, measures in report["methods"].items()}
    return {name: value for name, value in found.items() if value is not None}


def base_name(report: dict[str, Any]) -> str:
    """The method that the others are compared with: the first."""
    return next(iter(report["methods"]))


def shown_pictures(report: dict[str, Any]) -> str:
    """Which pictures the loss is of whose flatness is told."""
    of = find(report, "settings", "flatness", "of") or "training"
    return {"training": "training pictures", "heldout": "held-out pictures"}[of]


def band_name(band: dict[str, Any]) -> str:
    """The timesteps of a band of losses: its first, and that before which it ends."""
    return f"{band['from']}-{band['to']}"
