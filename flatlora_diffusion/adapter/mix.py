"""Several adapters at once, each at its scale: what a mix is, and how a command line says it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.common.command import parse_adapter


@dataclass(frozen=True)
class Mix:
    """Adapters that are active together: a weight gets the sum of their updates, each times its scale.

    Attributes:
        parts: File, or folder that holds it, and scale of each.
    """

    parts: tuple[tuple[Path, float], ...]


Source = Path | Mix
"""Where an adapter comes from: its file, the folder that holds it, or several of them."""


def parse_source(argument: str) -> tuple[str, Source]:
    """NAME=PATH of a command line, or NAME=PATH@SCALE+PATH@SCALE for a mix; a scale may be left out.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    name, path = parse_adapter(argument)
    if path.exists():
        return name, path
    parts = tuple(_scaled(argument, text) for text in str(path).split("+"))
    if len(parts) == 1 and parts[0][1] == 1:
        return name, parts[0][0]
    return name, Mix(parts)


def parse_scaled(argument: str) -> tuple[str, Source, float]:
    """The same with the scale of a single adapter apart, as a grid has it; a mix has its parts' scales."""
    name, source = parse_source(argument)
    if isinstance(source, Mix) and len(source.parts) == 1:
        return name, *source.parts[0]
    return name, source, 1.0


def mix_digest(parts: Iterable[tuple[str, float]]) -> str:
    """A hash of a mix, of the SHA-256 and the scale of each part; their order doesn't count."""
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def _scaled(argument: str, text: str) -> tuple[Path, float]:
    """PATH or PATH@SCALE."""
    start, separator, scale = text.rpartition("@")
    if text and (not separator or Path(text).exists()):
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not start or not math.isfinite(number):
        raise argparse.ArgumentTypeError(
            f"{argument}: must be NAME=PATH or NAME=PATH@SCALE, or have several PATH@SCALE with + between "
            f"them ({text} doesn't exist, {scale!r} is no number)"
        )
    return Path(start), number
