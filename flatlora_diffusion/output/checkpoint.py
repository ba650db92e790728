"""Checkpoints that are complete or not there, verified before they are trusted.

A checkpoint is a folder `checkpoint-STEP`, written under another name, synced to disk and then renamed. Its
`state.json`, the last file written, holds a hash of every other file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.formats import read_tensors
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import sync_folder
from flatlora_diffusion.output.going_on import Differences, differences

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"

_FOLDER = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: Optimizer steps done.
        adapter: The adapter as a safetensors file in the diffusers format; the average, where one is taken.
        optimizer: Tensors of the optimizer's state.
        settings: All settings that decide the run's result, by name.
        scalars: Everything else, as JSON: rates, gradient scale, losses so far, the optimizer's numbers.
        others: Further files, by name: `LIVE_NAME`, where `adapter` is an average, embeddings.
    """

    step: int
    adapter: bytes
    optimizer: dict[str, Tensor]
    settings: dict[str, Any]
    scalars: dict[str, Any]
    others: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A sound checkpoint on disk.

    Attributes:
        folder: Where it is.
        step: Optimizer steps done.
        settings: Those that it was made with.
        scalars: See `Checkpoint`.
        differences: What the run that goes on from it has other settings in.
    """

    folder: Path
    step: int
    settings: dict[str, Any]
    scalars: dict[str, Any]
    differences: Differences = field(default_factory=dict)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one of its safetensors files."""
        return read_tensors(self.folder / name)


def write_checkpoint(output_dir: Path, checkpoint: Checkpoint, total_limit: int | None) -> Path:
    """Write `checkpoint-STEP` and then remove the oldest beyond the limit; one that cannot be is named.

    Raises:
        UserError: The disk is full or not writable. What was there before is still there.
    """
    folder = output_dir / f"checkpoint-{checkpoint.step}"
    unfinished = output_dir / f"{_UNFINISHED}{folder.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        files = {WEIGHTS_NAME: checkpoint.adapter, OPTIMIZER_NAME: save(checkpoint.optimizer)}
        files |= checkpoint.others
        state = {
            "step": checkpoint.step,
            "settings": checkpoint.settings,
            "scalars": checkpoint.scalars,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        state = json.loads(json.dumps(state))  # what will be read back: lists for tuples
        state["sha256"][STATE_NAME] = _state_hash(state)
        files[STATE_NAME] = json.dumps(state, indent=2).encode()
        for name, content in files.items():
            with (unfinished / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(unfinished)
        _put_in_place(unfinished, folder)
        sync_folder(output_dir)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{folder}: the checkpoint cannot be written ({error.strerror}); earlier ones are untouched: "
            "free some space and go on with --resume_from_checkpoint latest"
        ) from error
    if total_limit is not None:
        others = sorted(step for step in _steps(output_dir) if step != checkpoint.step)
        for step in others[: max(0, len(others) - (total_limit - 1))]:
            old = output_dir / f"checkpoint-{step}"
            try:
                shutil.rmtree(_set_aside(old))
            except OSError as error:  # no reason to stop training
                logger.warning("%s cannot be removed (%s)", old, error.strerror)
    return folder


def find_checkpoint(output_dir: Path, wanted: str, settings: dict[str, Any]) -> Stored | None:
    """The checkpoint to resume from: verified, and of a run that can go on with the present settings.

    A damaged checkpoint is named in the log and the newest sound one before it is taken.

    Args:
        output_dir: Where the run writes.
        wanted: `latest`, the name of a checkpoint in the output folder, or the path of one elsewhere. Its
            folder may have been renamed.
        settings: Those of the present run.

    Returns:
        The checkpoint, or None where `latest` finds none.

    Raises:
        UserError: The named checkpoint doesn't exist, is of the diffusers script, no checkpoint is sound, or
            settings that must stay differ (`going_on.BINDING`).
    """
    if output_dir.is_dir():
        for leftover in output_dir.glob(f"{_UNFINISHED}*"):
            final = output_dir / leftover.name.removeprefix(_UNFINISHED)
            if _FOLDER.fullmatch(final.name) and not final.exists() and _verify(leftover)[1]:
                leftover.rename(final)  # complete: the kill came just before its last step
            else:
                shutil.rmtree(leftover, ignore_errors=True)
    # A bare name is one in the output folder; a path is what it says.
    place = output_dir if len(Path(wanted).parts) == 1 else Path(wanted).parent
    steps = sorted(_steps(place), reverse=True)
    if wanted != "latest":
        folder = place / Path(wanted).name
        if _of_diffusers(folder):
            raise UserError(f"--resume_from_checkpoint {wanted}: {_what_to_start_from(folder)}")
        match = _FOLDER.fullmatch(folder.name)
        if not match and (folder / STATE_NAME).is_file():
            return _renamed(folder, settings)
        if not match or int(match[1]) not in steps:
            known = ", ".join(f"checkpoint-{step}" for step in sorted(steps)) or "none"
            raise UserError(f"--resume_from_checkpoint {wanted}: not in {place} (there: {known})")
        steps = [step for step in steps if step <= int(match[1])]
    for step in steps:
        folder = place / f"checkpoint-{step}"
        problem, stored = _verify(folder)
        if stored is None:
            if _of_diffusers(folder):
                raise UserError(f"{folder}: {_what_to_start_from(folder)}")
            logger.warning("%s is damaged (%s); looking for an earlier one", folder, problem)
            continue
        return _compared(stored, settings)
    if steps:
        raise UserError(f"{place}: no checkpoint is sound; start again in another --output_dir")
    return None


def _renamed(folder: Path, settings: dict[str, Any]) -> Stored:
    """The checkpoint of a folder whose name doesn't say so."""
    problem, stored = _verify(folder)
    if stored is None:
        raise UserError(f"{folder}: the checkpoint is damaged ({problem}); give another one")
    return _compared(stored, settings)


def _of_diffusers(folder: Path) -> bool:
    """Whether accelerate has written a checkpoint there, as the diffusers script has it do."""
    pickles = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
    return not (folder / STATE_NAME).exists() and any((folder / name).is_file() for name in pickles)


def _what_to_start_from(folder: Path) -> str:
    """What a checkpoint of the diffusers script is, and what can be taken of it: pickles are never read."""
    met = "a checkpoint of the diffusers script, whose optimizer is pickled and could run code"
    if (folder / WEIGHTS_NAME).is_file():
        return f"{met}; start from its adapter: --lora_weights {folder / WEIGHTS_NAME}"
    return f"{met}, and without {WEIGHTS_NAME}, so that nothing of it can be taken"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the highest step, not verified."""
    return next(iter(checkpoints(output_dir)), None)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the highest step first, not verified."""
    return [output_dir / f"checkpoint-{step}" for step in sorted(_steps(output_dir), reverse=True)]


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` holds, verified by its own hash; the files beside it are not read.

    Raises:
        UserError: The file is missing or has changed since it was written.
    """
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        sound = state["sha256"].pop(STATE_NAME) == _state_hash(state)
    except OSError as error:
        raise UserError(f"{STATE_NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{STATE_NAME} is not what was written") from error
    if not sound:
        raise UserError(f"{STATE_NAME} has changed since it was written")
    return state


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors in the state of an optimizer: `INDEX.NAME`, where the index counts its parameters."""
    tensors = {
        f"{index}.{name}": value
        for index, entry in _state(optimizer).items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    # A file has room for a tensor once; 8-bit optimizers share the map of their codes between parameters.
    met: set[int] = set()
    for key, value in tensors.items():
        if value.data_ptr() in met:
            tensors[key] = value.clone()
        met.add(value.data_ptr())
    return tensors


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers beside the tensors in the state of an optimizer: Prodigy keeps its estimates there."""
    groups = optimizer.state_dict()["param_groups"]

    def numbers(entry: dict[str, Any]) -> dict[str, float]:
        return {name: value for name, value in entry.items() if type(value) in (int, float)}

    return {
        "state": {str(index): numbers(entry) for index, entry in _state(optimizer).items()},
        "groups": [numbers(group) for group in groups],
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Undo `flatten_optimizer` and `optimizer_numbers`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in numbers["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, numbers["groups"], strict=True):
        group.update(saved)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Index of a parameter -> its state, also what bitsandbytes puts into a dictionary inside it."""
    flat: dict[int, dict[str, Any]] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        flat[index] = {}
        for name, value in entry.items():
            flat[index].update(value if isinstance(value, dict) else {name: value})
    return flat


def _steps(output_dir: Path) -> Iterator[int]:
    if output_dir.is_dir():
        for entry in output_dir.iterdir():
            match = _FOLDER.fullmatch(entry.name)
            if match and entry.is_dir():
                yield int(match[1])


def _verify(folder: Path) -> tuple[str | None, Stored | None]:
    """What is wrong with a checkpoint, or the checkpoint."""
    try:
        state = read_state(folder)
        for name, expected in state["sha256"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                return f"{name} has changed since it was written", None
        return None, Stored(folder, state["step"], state["settings"], state["scalars"])
    except UserError as error:
        return str(error), None
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}", None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE_NAME} is not what was written", None


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _compared(stored: Stored, settings: dict[str, Any]) -> Stored:
    found = differences(stored.folder, stored.settings, settings)
    return dataclasses.replace(stored, differences=found)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Give a complete checkpoint its name; one that had it before stays if that fails."""
    if not folder.exists():
        unfinished.rename(folder)
        return
    replaced = _set_aside(folder)
    try:
        unfinished.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Rename a folder that is to be removed: a kill in between leaves no half of it under its own name."""
    doomed = folder.with_name(f"{_UNFINISHED}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    return folder.rename(doomed)
