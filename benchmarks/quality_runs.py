"""The runs of `benchmarks.quality` on the disk: which are finished, and whose arms have changed since."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from benchmarks.quality_arms import Arm, run_folder
from flatlora_diffusion.config.settings import TrainConfig

RIVAL = "rival.json"

# Folders that count by their names: the project, or the folder of all runs, may have been moved.
_MOVABLE = ("pretrained_model_name_or_path", "instance_data_dir", "class_data_dir")


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds its adapter and all that belongs to it."""
    from flatlora_diffusion.output.names import (
        SUMMARY,  # it brings libraries that must be told first to be quiet
    )

    return (folder / SUMMARY).is_file()


def record_rival(arm: Arm, folder: Path) -> None:
    """Leave in a run's folder what its summary won't tell: the rival that trains it, if any, and its rho."""
    from flatlora_diffusion.common.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RIVAL, json.dumps(_rival(arm)).encode())


def change_since(work: Path, name: str, arm: Arm, seed: int) -> str | None:
    """How an arm differs from what it was when its run was trained, in a line that names the run.

    Args:
        work: The folder of all runs.
        name: Of the arm.
        arm: As it is now.
        seed: Of the run.

    Returns:
        None where nothing differs, or the run isn't finished.
    """
    from flatlora_diffusion.output.names import SUMMARY

    folder = run_folder(work, name, seed)
    if not is_finished(folder):
        return None
    where = folder.relative_to(work)
    # A setting that the project didn't have yet was what its default is.
    defaults = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    try:
        settings = json.loads((folder / SUMMARY).read_bytes())["settings"]
        # Runs have been trained without this file; what a rival was then is what it is now.
        recorded = json.loads((folder / RIVAL).read_bytes()) if (folder / RIVAL).is_file() else {}
        was = _comparable(defaults | _rival(arm) | settings | recorded)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{where}: {SUMMARY} or {RIVAL} is damaged"
    now = _comparable(_rival(arm) | arm.config(seed, folder, work).settings())
    changes = [
        f"{setting} was {was.get(setting)} and is {value} now"
        for setting, value in now.items()
        if was.get(setting) != value
    ]
    return f"{where}: {', '.join(changes)}" if changes else None


def _rival(arm: Arm) -> dict[str, Any]:
    return {"rival": arm.rival, "rho": arm.rho}


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON keeps them, without places."""
    kept = {name: value for name, value in settings.items() if name != "output_dir"}
    named = {name: Path(kept[name]).name for name in _MOVABLE if kept.get(name)}
    return json.loads(json.dumps(kept | named))
