"""A comparison: what was asked for, and the pictures of all methods in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from flatlora_diffusion.app.files import forget
from flatlora_diffusion.draw.pipeline import Drawing


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked.

    Attributes:
        prompt: What is drawn.
        seed: Of the initial noise.
        drawing: How.
        scale: Of the adapters.
        mixes: Labels of the mixes on the page, each with the scales of its adapters.
    """

    prompt: str
    seed: int
    drawing: Drawing
    scale: float
    mixes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def made(self, method: str) -> tuple[str, str, int, Drawing, float, tuple[float, ...]]:
        """What made a method's picture, as `Studio.stamp` takes it."""
        return method, self.prompt, self.seed, self.drawing, self.scale, dict(self.mixes).get(method, ())

    def link(self, left: str, right: str) -> str:
        """The query that opens the page with this comparison."""
        fields = self.fields()
        values = dict(zip(setting_names(len(fields)), fields, strict=True))
        values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
        return "?" + urlencode({**values, "left": left, "right": right})

    def fields(self) -> list[str | int | float]:
        """The values of the page's fields, in the order of `setting_names`."""
        drawing = self.drawing
        return [
            *(self.prompt, drawing.negative_prompt or "", self.seed, drawing.steps, drawing.guidance),
            *(self.scale, drawing.sampler, drawing.width, drawing.height),
            *(scale for _, scales in self.mixes for scale in scales),
        ]


SETTINGS = (
    *("prompt", "negative_prompt", "seed", "steps", "guidance", "scale", "sampler", "width", "height"),
)
"""What links call the settings that every page has, in the order of its fields."""


def setting_names(count: int) -> tuple[str, ...]:
    """What links call all settings of a page that has so many: the scales in its mixes come last."""
    return (*SETTINGS, *(f"part{number}" for number in range(1, count - len(SETTINGS) + 1)))


@dataclass(frozen=True)
class Comparison:
    """A comparison that is drawn.

    Attributes:
        asked: What for.
        files: Method -> its picture.
        seconds: Method -> that its drawing took.
        archive: All of it, to be downloaded.
        lent: It goes when nobody holds it any more.
    """

    asked: Asked
    files: Mapping[str, Path]
    seconds: Mapping[str, float]
    archive: Path
    lent: bool = True

    def forget(self) -> None:
        """Delete its files, where they are lent."""
        if self.lent:
            forget({file.parent for file in self.files.values()})


MOST_KEPT = 6


@dataclass(frozen=True)
class Shelf:
    """A visitor's last comparisons.

    Attributes:
        kept: The newest first.
        shown: Index of the one on the page.
    """

    kept: tuple[Comparison, ...] = ()
    shown: int = 0

    @property
    def current(self) -> Comparison | None:
        """The one on the page."""
        return self.kept[self.shown] if self.kept else None

    def with_new(self, comparison: Comparison) -> Shelf:
        """One more, shown; what no longer has a place is deleted."""
        kept = (comparison, *self.kept)
        for old in kept[MOST_KEPT:]:
            old.forget()
        return Shelf(kept[:MOST_KEPT])

    def showing(self, index: int) -> Shelf:
        """Another of them is shown."""
        return dataclasses.replace(self, shown=index)

    def forget(self) -> None:
        """Delete the files of all."""
        for comparison in self.kept:
            comparison.forget()
