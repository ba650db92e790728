"""Grids as plans: which pictures there are, where each stands, and what it is called."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.sheet.layout import Label

if TYPE_CHECKING:
    from flatlora_diffusion.draw.pipeline import Drawing

AXES = ("prompt", "seed", "method")
DRAWING_AXES = ("steps", "guidance", "sampler")
"""Settings of the drawing that are axes where they have several values."""

MAX_CELLS = 4096

_LONGEST_SLUG = 40  # characters of a prompt or label in a file's name


@dataclass(frozen=True)
class Method:
    """A way to draw a prompt: the base alone, or with an adapter.

    Attributes:
        label: What the sheet calls it.
        adapter: Name under which the adapter is loaded, or None for the base alone.
        scale: Of the adapter's update.
    """

    label: str
    adapter: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One picture of a grid.

    Attributes:
        prompt: What is drawn.
        seed: Of the initial noise.
        method: How.
        file: Name of its file, which no other cell of the grid has and which doesn't depend on the layout.
        settings: Name and value of each setting of the drawing that is an axis.
    """

    prompt: str
    seed: int
    method: Method
    file: str
    settings: tuple[tuple[str, Any], ...] = ()

    def drawing(self, shared: Drawing) -> Drawing:
        """How it is drawn.

        Args:
            shared: How all are, but for these settings.
        """
        return dataclasses.replace(shared, **dict(self.settings))


@dataclass(frozen=True)
class Grid:
    """Every prompt with every seed, every method, and every one of further settings.

    Attributes:
        prompts: All different.
        seeds: All different; 64 bits at most.
        methods: With different labels.
        rows: The axes (`prompt`, `seed`, `method`, and those below) that go downwards, the slowest first.
            Those of `DRAWING_AXES` that are in neither come last here.
        columns: Those that go to the right; each axis is in one of the two.
        steps: Numbers of denoising steps; none where all pictures have the drawing's.
        guidance: Strengths of guidance, in the same way.
        sampler: Names of samplers, in the same way.

    Raises:
        UserError: One of these doesn't hold, or the grid has more than `MAX_CELLS` pictures.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[Method]
    rows: Sequence[str] = ("prompt", "seed")
    columns: Sequence[str] = ("method",)
    steps: Sequence[int] = ()
    guidance: Sequence[float] = ()
    sampler: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "methods", "rows", "columns", *DRAWING_AXES):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        placed = (*self.rows, *self.columns)
        unplaced = tuple(axis for axis in self.settings_axes if axis not in placed)
        object.__setattr__(self, "rows", (*self.rows, *unplaced))
        axes = (*AXES, *self.settings_axes)
        if sorted([*self.rows, *self.columns]) != sorted(axes):
            given = f"rows {' '.join(self.rows)}, columns {' '.join(self.columns)}"
            raise UserError(f"{given}: each of {', '.join(axes)} must be in one of them, once")
        for axis, values in zip(AXES, (self.prompts, self.seeds, self.methods), strict=True):
            if not values:
                raise UserError(f"there is no {axis}; give at least one")
        if len(self) > MAX_CELLS:
            further = "".join(f", {len(self._values(axis))} {axis} values" for axis in self.settings_axes)
            raise UserError(
                f"{len(self.prompts)} prompts, {len(self.seeds)} seeds and {len(self.methods)} "
                f"methods{further} are {len(self)} pictures, more than the limit of {MAX_CELLS}; use fewer"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**64:
                raise UserError(f"seed {seed}: must be 0 or more and have 64 bits at most")
        for method in self.methods:
            if not method.label.strip():
                raise UserError("a method has no name; give each one of its own")
            if not math.isfinite(method.scale):
                raise UserError(f"{method.label}: its scale {method.scale} must be a finite number")
        labels = [method.label for method in self.methods]
        own = [(axis, self._values(axis)) for axis in self.settings_axes]
        for axis, values in (("prompt", self.prompts), ("seed", self.seeds), ("method", labels), *own):
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise UserError(f"{axis} {value}: is there twice; each needs to be different")

    def __len__(self) -> int:
        return math.prod(len(self._values(axis)) for axis in (*AXES, *self.settings_axes))

    @property
    def settings_axes(self) -> tuple[str, ...]:
        """Those of `DRAWING_AXES` that have values here."""
        return tuple(axis for axis in DRAWING_AXES if getattr(self, axis))

    def batches(self, size: int) -> list[list[Cell]]:
        """The pictures in the order of drawing: method by method, at most `size` together."""
        names = self._file_names()
        batches = []
        for method in self.methods:
            for settings in self._places(self.settings_axes):
                cells = [
                    self._cell({"prompt": prompt, "seed": seed, "method": method, **settings}, names)
                    for prompt in self.prompts
                    for seed in self.seeds
                ]
                batches += [cells[start : start + size] for start in range(0, len(cells), size)]
        return batches

    def table(self) -> list[list[Cell]]:
        """The pictures as they stand: rows of cells."""
        names = self._file_names()
        return [
            [self._cell(row | column, names) for column in self._places(self.columns)]
            for row in self._places(self.rows)
        ]

    def labels(self, axes: Sequence[str], *, shared: bool = True) -> list[Label]:
        """What is written at each row (`axes` is `grid.rows`) or column (`grid.columns`).

        Args:
            axes: Those of the rows or of the columns.
            shared: Whether to write also what `shared` leaves to the small print.
        """
        shown = [axis for axis in axes if shared or axis not in self.shared()]
        labels = [tuple(self._text(axis, place[axis]) for axis in shown) for place in self._places(axes)]
        return [label if len(label) > 1 else "".join(label) for label in labels]

    def shared(self) -> list[str]:
        """The axes that needn't be written at rows and columns, since all pictures have the same there.

        At the rows, and at the columns, one axis is always written.
        """
        same = [[axis for axis in axes if len(self._values(axis)) == 1] for axes in (self.rows, self.columns)]
        for axes, own in zip((self.rows, self.columns), same, strict=True):
            if own and own == list(axes):
                own.pop(0)
        return [axis for own in same for axis in own]

    def _values(self, axis: str) -> Sequence[Any]:
        own = {axis: getattr(self, axis) for axis in DRAWING_AXES}
        return {"prompt": self.prompts, "seed": self.seeds, "method": self.methods, **own}[axis]

    def _places(self, axes: Sequence[str]) -> list[dict[str, Any]]:
        combinations = itertools.product(*(self._values(axis) for axis in axes))
        return [dict(zip(axes, values, strict=True)) for values in combinations]

    @staticmethod
    def _text(axis: str, value: Any) -> str:
        if isinstance(value, Method):
            return value.label
        if axis == "seed":
            return f"seed {value}"
        if axis == "steps":
            return f"{value} steps"
        if axis == "guidance":
            return f"guidance {value:g}"
        return str(value) if str(value).strip() else "(no prompt)"

    def _cell(self, place: Mapping[str, Any], names: Mapping[str, Mapping[Any, str]]) -> Cell:
        """The picture at a place: axis -> value."""
        settings = tuple((axis, place[axis]) for axis in self.settings_axes)
        parts = [names["prompt"][place["prompt"]], f"seed{place['seed']}", names["method"][place["method"]]]
        parts += [names[axis][value] for axis, value in settings]
        return Cell(place["prompt"], place["seed"], place["method"], f"{'-'.join(parts)}.png", settings)

    def _file_names(self) -> dict[str, dict[Any, str]]:
        """Axis -> value -> what the names of files call it."""
        told: dict[str, Sequence[str]] = {
            "prompt": self.prompts,
            "method": [method.label for method in self.methods],
            **{axis: [self._text(axis, v) for v in self._values(axis)] for axis in self.settings_axes},
        }
        return {
            axis: dict(zip(self._values(axis), unique_slugs(texts), strict=True))
            for axis, texts in told.items()
        }


def unique_slugs(texts: Iterable[str]) -> list[str]:
    """The texts in a-z, 0-9, dots and underscores, short; a number tells apart those that come out alike."""
    slugs: list[str] = []
    for number, text in enumerate(texts):
        slug = re.sub(r"[^a-z0-9.]+", "_", text.lower())[:_LONGEST_SLUG].strip("_.")
        if not slug or slug in slugs:
            slug = f"{slug}_{number:03d}".strip("_")
        while slug in slugs:  # another is called just this
            slug += "_"
        slugs.append(slug)
    return slugs
