"""The adapter with the lowest held-out loss, kept beside the last one, and when to stop for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.new_tokens import EMBEDDINGS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.output.checkpoint import Stored
from flatlora_diffusion.output.names import BEST, SUMMARY

_PREFIX = "best_"  # of its files in a checkpoint
_KEY = "best"
_NAMES = (EMBEDDINGS_NAME, WEIGHTS_NAME)  # the adapter comes last: its file says that both are there


class BestStep:
    """Keeps the files of the best adapter so far in memory; checkpoints and the end of a run write them.

    Attributes:
        step: After which it was measured; None before the first measurement.
        loss: Of the held-out images.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.loss = math.inf
        self._files: dict[str, bytes] = {}

    def offer(self, step: int, loss: float, files: Callable[[], Mapping[str, bytes]]) -> None:
        """Take an adapter in the place of the best one, if its loss is lower.

        Args:
            step: After which it was measured.
            loss: Of the held-out images.
            files: Makes its files, by name.
        """
        if loss < self.loss:
            self.step, self.loss = step, loss
            self._files = {name: content for name, content in files().items() if name in _NAMES}

    def for_checkpoint(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The files, and what else has to be known."""
        if self.step is None:
            return {}, {}
        files = {_PREFIX + name: content for name, content in self._files.items()}
        return files, {_KEY: {"step": self.step, "loss": self.loss}}

    def resume(self, stored: Stored) -> None:
        """Go on from what `for_checkpoint` gave; a checkpoint of an older version has nothing."""
        if known := stored.scalars.get(_KEY):
            self.step, self.loss = known["step"], known["loss"]
            paths = {name: stored.folder / f"{_PREFIX}{name}" for name in _NAMES}
            self._files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    def write(self, output: Path, last: int) -> dict[str, Any] | None:
        """Write the best adapter into its folder, unless it is the last one; what a summary says of it.

        Args:
            output: Of the run.
            last: Step of the run's last adapter.

        Raises:
            UserError: The disk is full or not writable.
        """
        folder = output / BEST
        if self.step is None or self.step == last:
            for name in _NAMES:  # of an earlier run in this folder
                (folder / name).unlink(missing_ok=True)
            file = WEIGHTS_NAME
        else:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
            for name in _NAMES:
                if name in self._files:
                    write_atomically(folder / name, self._files[name])
            file = f"{BEST}/{WEIGHTS_NAME}"
        return None if self.step is None else {"step": self.step, "heldout_loss": self.loss, "file": file}


def is_worse(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether the lowest loss is so many measurements ago.

    Args:
        losses: Step -> held-out loss.
        patience: Measurements; None never stops.
    """
    if patience is None or not losses:
        return False
    measured = [losses[step] for step in sorted(losses)]
    finite = [loss if math.isfinite(loss) else math.inf for loss in measured]
    return len(measured) - 1 - finite.index(min(finite)) >= patience


def stopped_at(output: Path) -> int | None:
    """The last step of a run that `is_worse` has ended, from its summary; None for any other."""
    try:
        content = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        return content["steps"] if content.get("stopped_when_worse") else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None
