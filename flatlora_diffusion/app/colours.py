"""The colours of methods and runs, the same in every plot."""

from __future__ import annotations

from collections.abc import Sequence

from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.output.names import ARMS

METHOD_COLOURS = dict(zip(ARMS, ("#d97706", "#3b82f6"), strict=True))
"""Method -> its colour in every plot: orange and blue stay apart for the colour-blind too."""

OTHER_COLOURS = ("#be4bb4", "#0f9488", "#8b6f5c", "#7c7cf0")
"""Colours of further runs, taken in turn."""

FOLD_COLOUR = "#808080"
"""Of the curve of each fold, beside that of their mean."""

_OF_BASE = "#6b7280"


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Method -> colour: grey for the base, that of its kind, or one of its own."""
    known = {BASE: _OF_BASE, **METHOD_COLOURS}
    others = [method for method in methods if method not in known]
    own = {method: OTHER_COLOURS[place % len(OTHER_COLOURS)] for place, method in enumerate(others)}
    return {method: known.get(method) or own[method] for method in methods}
