"""What the folds of a run have found: a curve of held-out losses each, their mean, and the best step.

With --use_ema both the average and the adapter itself are measured, and the better of them counts.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.output.names import FOLDS

CURVES = "curves.json"
TABLE = "curves.csv"


@dataclass(frozen=True)
class Folds:
    """What they have found.

    Attributes:
        total_steps: That each fold trained.
        images: How many each fold held out.
        curves: Of each fold: step -> mean loss of the images that it held out.
        averaged: Whether these are losses of the adapter's average (--use_ema).
        other: What was measured beside it and was worse: the adapter itself, or its average.
    """

    total_steps: int
    images: tuple[int, ...]
    curves: tuple[Mapping[int, float], ...]
    averaged: bool = False
    other: Folds | None = None

    @property
    def mean(self) -> dict[int, float]:
        """Step -> mean loss of all images, each held out once, where all folds have measured it.

        With `n_k` images in fold k: `mean(t) = sum_k n_k loss_k(t) / sum_k n_k`.
        """
        shared = set[int].intersection(*(set(curve) for curve in self.curves))
        return {
            step: sum(n * curve[step] for n, curve in zip(self.images, self.curves, strict=True))
            / sum(self.images)
            for step in sorted(shared)
        }

    @property
    def _finite(self) -> dict[int, float]:
        return {step: loss for step, loss in self.mean.items() if math.isfinite(loss)}

    @property
    def best_step(self) -> int:
        """The step whose mean is lowest; of equal ones the first.

        Raises:
            UserError: There is no step whose loss all folds have.
        """
        finite = self._finite
        if not finite:
            raise UserError(
                "--folds: there is no step at which all folds have a held-out loss; the log says why, and a "
                "smaller --train_batch_size needs less memory for it"
            )
        return min(finite, key=finite.__getitem__)

    @property
    def best_loss(self) -> float:
        """The mean after the best step."""
        return self.mean[self.best_step]

    def or_better(self, other: Folds) -> Folds:
        """Of two that were measured in the same runs the one whose lowest mean is lower, beside the other.

        Of equal ones it is this one. One that was never measured in all folds, or never finite, doesn't
        count.
        """
        if not other._finite:
            return self
        if not self._finite:
            return other
        if other.best_loss < self.best_loss:
            return dataclasses.replace(other, other=self)
        return dataclasses.replace(self, other=other)

    def summary(self) -> dict[str, Any]:
        """What a run's summary says of its folds."""
        mean = self.mean
        return {
            "number": len(self.curves),
            "best_step": self.best_step,
            "heldout_loss": self.best_loss,
            "last_step": max(mean),
            "last_heldout_loss": mean[max(mean)],
            **self._compared(lambda own: {"best_step": own.best_step, "heldout_loss": own.best_loss}),
        }

    def sentence(self, method: str) -> str:
        """What they have found, in words."""
        mean, best = self.mean, self.best_step
        last = max(mean)
        found = (
            f"{len(self.curves)} folds of {method}: the loss of images that weren't trained was lowest after "
            f"step {best} of {self.total_steps} ({mean[best]:.4g}"
        )
        if best < last:
            found = f"{found}; {mean[last]:.4g} after step {last})."
        else:
            found = f"{found}); it was still falling, so a larger --max_train_steps may be better."
        return f"{found} {compared}" if (compared := self.comparison()) else found

    def comparison(self) -> str | None:
        """Whether the average was better, in words; None where only one of the two was measured."""
        if self.other is None:
            return None
        lowest = f"{self.other.best_loss:.4g} after step {self.other.best_step}"
        if self.averaged:
            return f"The average (--use_ema) was better than the adapter itself ({lowest})."
        return f"The adapter itself was better than its average ({lowest}), so --use_ema is left off."

    def write(self, output: Path) -> None:
        """Write the curves and their mean as JSON and as a table, into the folder of the folds.

        Args:
            output: Folder of the run.

        Raises:
            UserError: The disk is full or not writable.
        """
        content = {"total_steps": self.total_steps, "images": self.images, **self._content()}
        content |= self._compared(Folds._content)
        columns = self._columns()
        if self.other:
            name = "adapter itself" if self.averaged else "average"
            columns |= {f"{column}, {name}": curve for column, curve in self.other._columns().items()}
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["step", *columns])
        for step in sorted(set[int].union(*(set(curve) for curve in columns.values()))):
            rows.writerow([step, *(curve.get(step, "") for curve in columns.values())])
        write_atomically(output / FOLDS / TABLE, table.getvalue().encode())
        write_atomically(output / FOLDS / CURVES, (json.dumps(content, indent=1) + "\n").encode())

    def _content(self) -> dict[str, Any]:
        return {"curves": self.curves, "mean": self.mean, "best_step": self.best_step}

    def _columns(self) -> dict[str, Mapping[int, float]]:
        return {f"fold {k}": curve for k, curve in enumerate(self.curves, start=1)} | {"mean": self.mean}

    def _compared(self, say: Callable[[Folds], dict[str, Any]]) -> dict[str, Any]:
        """Whether the average was better, and what there is to say of the other; nothing without one."""
        return {"averaged": self.averaged, "other": say(self.other)} if self.other else {}


def read_folds(output: Path) -> Folds | None:
    """What the folds of a run have found; None where it had none, or they aren't done.

    Args:
        output: Folder of the run.

    Raises:
        UserError: It cannot be read, or isn't what was written.
    """
    path = output / FOLDS / CURVES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        total, images = int(content["total_steps"]), tuple(map(int, content["images"]))
        found = Folds(total, images, _curves(content), bool(content.get("averaged")))
        if "other" not in content:
            return found
        other = Folds(total, images, _curves(content["other"]), not found.averaged)
        return dataclasses.replace(found, other=other)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{FOLDS}/{CURVES} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{FOLDS}/{CURVES} is not what was written") from error


def _curves(content: dict[str, Any]) -> tuple[dict[int, float], ...]:
    return tuple({int(step): float(loss) for step, loss in own.items()} for own in content["curves"])


def verdict(found: Mapping[str, Folds]) -> str:
    """Which of two methods images that weren't trained like better, each after its best step.

    Args:
        found: Method -> its folds, which held out the same images.
    """
    best, other = sorted(found, key=lambda method: found[method].best_loss)
    ends = [
        [curve.get(found[method].best_step, math.nan) for curve in found[method].curves]
        for method in (best, other)
    ]
    lower = sum(one < two for one, two in zip(*ends, strict=True))
    told = [f"{method} {own.best_loss:.4g} after step {own.best_step}" for method, own in found.items()]
    return (
        f"Images that weren't trained like {best} better ({', '.join(told)}), in {lower} of {len(ends[0])} "
        "folds."
    )
