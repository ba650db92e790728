"""What was measured of the adapters on the page: by an evaluation in a run's folder, else by the runs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.output.reading import RunFolder

_REPORTS = ("evaluation.json", "evaluation/evaluation.json")  # in a run's folder, or that of a comparison
_SIGMA = 0.3  # that the rise is told of; else the largest one measured
_LARGE = 2.0  # percent of held-out loss that runs of one method seldom differ by


@dataclass(frozen=True)
class Measured:
    """Figures of the methods on the page. Empty where there are none.

    Attributes:
        heldout: Method -> loss of the pictures that no adapter was trained with.
        pictures: How many these are; None where that isn't known.
        rises: Method -> sigma and by how many percent the loss rises under noise of it on the weights.
    """

    heldout: Mapping[str, float] = field(default_factory=dict)
    pictures: int | None = None
    rises: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Mapping[str, RunFolder], adapters: Mapping[str, AdapterFacts], base: str) -> Measured:
        """The figures of just these adapter files with this base.

        Args:
            runs: Label -> training run.
            adapters: Label -> what the file is.
            base: The base's name in public.
        """
        for report in _reports(runs):
            try:
                found = cls._of_report(report, adapters, base)
            except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
                continue  # of another version, or damaged
            if found.heldout:
                return found
        return cls(_last_losses(runs, adapters))

    @classmethod
    def _of_report(cls, report: Any, adapters: Mapping[str, AdapterFacts], base: str) -> Measured:
        if base not in (report["base"], PureWindowsPath(report["base"]).name):  # it knows both slashes
            return cls()
        hashes = {sha256: label for label, sha256 in report["settings"]["adapters"].items()}
        names = {BASE: BASE} | {
            label: hashes[facts.sha256] for label, facts in adapters.items() if facts.sha256 in hashes
        }
        if len(names) == 1:
            return cls()
        own = {label: report["methods"][name] for label, name in names.items()}
        heldout = {
            label: float(found["heldout"]["loss"]) for label, found in own.items() if "heldout" in found
        }
        rises = {
            label: [
                (float(point["sigma"]), 100 * point["rise"] / found["flatness"]["loss"])
                for point in found["flatness"]["rise"]
            ]
            for label, found in own.items()
            if found.get("flatness") and found["flatness"].get("rise")
        }
        return cls(heldout, int(report["settings"]["heldout"]["pictures"]), rises)

    def verdict(self, left: str, right: str) -> str:
        """Whether the method on the right is better than that on the left; HTML that claims no more.

        Empty where nothing was measured of them.
        """
        if left not in self.heldout or right not in self.heldout:
            return ""
        one, other = html.escape(left), html.escape(right)
        change = 100 * (self.heldout[right] / self.heldout[left] - 1)
        pictures = f"{self.pictures} pictures" if self.pictures else "pictures"
        told = (
            f"<strong>Is {other} better?</strong> Its error in cleaning noise off {pictures} that it was not "
            "trained on is "
        )
        if abs(change) < 0.05:
            told += f"that of {one}."
        else:
            small = (
                "" if abs(change) >= _LARGE or BASE in (left, right) else ", so little that it may be chance"
            )
            told += f"{abs(change):.1f}% {'lower' if change < 0 else 'higher'} than that of {one}{small}."
        return told + self._rise_in_words(left, right)

    def _rise_in_words(self, left: str, right: str) -> str:
        both = [dict(self.rises.get(method, ())) for method in (left, right)]
        sigmas = both[0].keys() & both[1].keys()
        if not sigmas:
            return ""
        sigma = _SIGMA if _SIGMA in sigmas else max(sigmas)
        one, other = (rise[sigma] for rise in both)
        return (
            f" When its weights are shaken (sigma {sigma:g}), its error rises by {other:.1f}%, "
            f"that of {html.escape(left)} by {one:.1f}%."
        )


def _reports(runs: Mapping[str, RunFolder]) -> Iterator[Any]:
    folders = [folder for run in runs.values() for folder in (run.folder, run.comparison) if folder]
    for file in [folder / name for folder in dict.fromkeys(folders) for name in _REPORTS]:
        try:
            yield json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue


def _last_losses(runs: Mapping[str, RunFolder], adapters: Mapping[str, AdapterFacts]) -> dict[str, float]:
    """The held-out losses at the end of the arms of a comparison, which are measured in one way."""
    arms: dict[Path, dict[str, float]] = {}
    for label, run in runs.items():
        found = run.read() if run.comparison else None
        if found and run.comparison and found.finished and found.heldout and label in adapters:
            arms.setdefault(run.comparison, {})[label] = found.heldout[-1][1]
    return next((losses for losses in arms.values() if len(losses) > 1), {})
