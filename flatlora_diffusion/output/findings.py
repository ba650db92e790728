"""What was found out about adapters, in lines for their model card."""

from __future__ import annotations

import json
from pathlib import Path

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.strength import read_strength
from flatlora_diffusion.output.folds import read_folds, verdict
from flatlora_diffusion.output.names import SUMMARY


def best_steps(adapters: dict[str, Path]) -> list[str]:
    """A line for each adapter of which an earlier step was better on the held-out images.

    Args:
        adapters: Method -> folder of its adapter.
    """
    told = []
    for method, folder in adapters.items():
        path = folder / SUMMARY
        known = json.loads(path.read_text(encoding="utf-8")).get("best") if path.is_file() else None
        if known and known["file"] != WEIGHTS_NAME:
            told.append(
                f"The held-out loss of {method} was lowest after step {known['step']} "
                f"({known['heldout_loss']:.4g}): that adapter is `{known['file']}`.\n"
            )
    return told


def steps_of_folds(adapters: dict[str, Path]) -> list[str]:
    """What folds have found for each adapter, and which of two methods they like better.

    Args:
        adapters: Method -> folder of its adapter.
    """
    found = {method: folds for method, folder in adapters.items() if (folds := read_folds(folder))}
    told = [folds.sentence(method) for method, folds in found.items()]
    told += [verdict(found)] if len(found) > 1 else []
    return [f"{sentence}\n" for sentence in told]


def scales(adapters: dict[str, Path]) -> list[str]:
    """A line for each adapter in whose file an evaluation has noted a scale.

    Args:
        adapters: Method -> folder of its adapter.
    """
    noted = {method: read_strength(folder / WEIGHTS_NAME) for method, folder in adapters.items()}
    return [f"{strength.sentence(method)}\n" for method, strength in noted.items() if strength]
