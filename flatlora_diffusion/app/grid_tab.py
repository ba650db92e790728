"""The tab that draws prompts x seeds x methods onto one sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.files import zipped
from flatlora_diffusion.app.limits import DRAWS, MAX_PROMPT, MAX_SEED, PRIVATE
from flatlora_diffusion.app.site import Site, check_scale, refusal, warn_of_cut
from flatlora_diffusion.app.widgets import connect_stop, progress, scrolled_to, stop_button
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.draw.stamp import BASE, Stamp, png, sidecar
from flatlora_diffusion.grid.draw import sheet_png
from flatlora_diffusion.grid.plan import DRAWING_AXES, Cell, Grid, Method
from flatlora_diffusion.grid.recipe import Recipe

MAX_PICTURES = 60

_LAYOUTS = {
    "Prompts and seeds down, methods across": (("prompt", "seed"), ("method",)),
    "Prompts down, seeds and methods across": (("prompt",), ("seed", "method")),
    "Seeds down, prompts and methods across": (("seed",), ("prompt", "method")),
    "Methods down, prompts and seeds across": (("method",), ("prompt", "seed")),
    "Prompts and seeds down, settings and methods across": (("prompt", "seed"), (*DRAWING_AXES, "method")),
}


@dataclass(frozen=True)
class _Planned:
    """A grid that was asked for, checked: its recipe, and the batches and jobs that draw it."""

    recipe: Recipe
    batches: Sequence[Sequence[Cell]]
    jobs: Sequence[Job]


class GridTab:
    """Builds the tab in the current context.

    Args:
        site: Draws.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        gr.HTML(
            "<p>Many prompts and seeds (random starts), each drawn by every method, on one sheet to look at "
            "or to keep.</p>",
            elem_classes="lead",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self._build_settings()
            with gr.Column(scale=7, min_width=320, elem_id="grid-results"):
                self._build_results()
        self._connect()

    def _build_settings(self) -> None:
        site, methods = self._site, list(self._site.studio.methods)
        prompts = [group[0] for group in site.presets.values() if group]
        self.prompts = gr.Textbox(
            "\n".join(prompts), label="Prompts, one a line", lines=4, max_lines=12, elem_id="grid-prompts"
        )
        with gr.Row():
            self.draw_button = gr.Button(
                "Draw the grid", variant="primary", elem_id="grid-draw", min_width=120
            )
            self.stop_button = stop_button("grid-stop")
        self.seeds = gr.Textbox("0-1", label="Seeds, such as 0-3 7", max_lines=1, elem_id="grid-seeds")
        self.methods = gr.CheckboxGroup(methods, value=methods, label="Methods")
        self.scales = gr.Textbox(
            "1",
            label="Scales of the adapters",
            info="Several, with spaces between, give a column each.",
            max_lines=1,
            elem_id="grid-scales",
        )
        self.layout = gr.Dropdown(list(_LAYOUTS), value=next(iter(_LAYOUTS)), label="Layout")
        with gr.Accordion("More settings", open=False):
            self._drawing = site.drawing_fields()
        with gr.Accordion("Several steps, guidances, samplers", open=False):
            gr.HTML(
                "<p>Each is an axis in place of the one value above. They go downwards, unless the "
                "layout has settings across.</p>",
                elem_classes="caption",
            )
            self.steps = gr.Textbox(
                "",
                label="Several numbers of steps",
                placeholder="10 20 40",
                max_lines=1,
                elem_id="grid-steps",
            )
            self.guidance = gr.Textbox(
                "", label="Several guidances", placeholder="1 3 6", max_lines=1, elem_id="grid-guidance"
            )
            self.samplers = gr.Dropdown(list(SAMPLERS), value=[], multiselect=True, label="Several samplers")

    def _build_results(self) -> None:
        self.status = gr.HTML(progress("Press Draw the grid."), elem_id="grid-status")
        self.sheet = gr.Image(
            format="png",
            label="Sheet",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="grid-sheet",
            alt_text="The sheet: not drawn yet",
        )
        self.download = gr.DownloadButton(
            "Download sheet and pictures (ZIP)", interactive=False, elem_id="grid-download"
        )
        self.gallery = gr.Gallery(
            format="png",
            label="Pictures as they are drawn",
            columns=4,
            object_fit="contain",
            interactive=False,
            elem_id="grid-pictures",
            elem_classes=self._site.picture_class,
        )

    def _connect(self) -> None:
        asked = [self.prompts, self.seeds, self.methods, self.scales, self.layout, *self._drawing]
        asked += [self.steps, self.guidance, self.samplers]
        drawing = self.draw_button.click(
            self._draw,
            asked,
            [self.status, self.sheet, self.download, self.gallery],
            show_progress="full",
            show_progress_on=self.status,
            js=scrolled_to("grid-results"),
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        connect_stop(self.stop_button, self.status, [drawing])
        files, facts = gr.Files(visible=False), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            self._draw_for_programs,
            asked,
            [files, facts],
            api_name="grid",
            api_description="Draw prompts x seeds x methods: the sheet, then each picture, and their JSON.",
            **DRAWS,
        )

    # Handlers.

    def _planned(
        self,
        prompts: str,
        seeds: str,
        methods: Sequence[str],
        scales: str,
        layout: str,
        *settings: Any,
    ) -> _Planned:
        """The grid that the fields ask for; one that is too large is refused before anything is drawn."""
        *drawing, steps, guidances, samplers = settings
        how = self._site.drawing(*drawing)
        varied = self._varied(drawing, steps, guidances, samplers)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        longest = max(map(len, lines), default=0)
        if longest > MAX_PROMPT:
            raise refusal(f"Each prompt must have at most {MAX_PROMPT} characters; one has {longest}.")
        factors = [check_scale(scale) for scale in _numbers(scales, "scale")]
        rows, columns = (
            [axis for axis in axes if axis not in DRAWING_AXES or varied[axis]] for axes in _LAYOUTS[layout]
        )
        columns_of = {
            method: factors if method in self._site.studio.adapters else [1.0] for method in methods
        }
        chosen = [
            Method(method if len(own) == 1 else f"{method} x {scale:g}", _adapter(method), scale)
            for method, own in columns_of.items()
            for scale in own
        ]
        numbers = _seeds(seeds)
        further = {axis: len(values) for axis, values in varied.items() if values}
        pictures = len(lines) * len(numbers) * len(chosen) * math.prod(further.values())
        if pictures > MAX_PICTURES:
            told = "".join(f", {count} values of {axis}" for axis, count in further.items())
            raise refusal(
                f"{len(lines)} prompts, {len(numbers)} seeds and {len(chosen)} methods{told} are {pictures} "
                f"pictures; this page draws at most {MAX_PICTURES}. For more there is the command "
                "python -m flatlora_diffusion.grid."
            )
        studio = self._site.studio
        warn_of_cut(studio, *lines, how.negative_prompt)
        try:
            grid = Grid(lines, numbers, chosen, rows, columns, **varied)
            adapters = {label: facts.source for label, facts in studio.adapters.items()}
            recipe = Recipe(studio.base, grid, how, adapters, dtype=studio.dtype)
            recipe.check_size()
        except (UserError, ValueError) as error:
            raise refusal(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        batches = grid.batches(self._site.batch_size)
        jobs = [
            Job(
                batch[0].method.adapter or BASE,
                [(cell.prompt, cell.seed) for cell in batch],
                batch[0].drawing(how),
                batch[0].method.scale,
            )
            for batch in batches
        ]
        return _Planned(recipe, batches, jobs)

    def _varied(
        self, drawing: Sequence[Any], steps: str, guidances: str, samplers: Sequence[str]
    ) -> dict[str, list[Any]]:
        """Axis -> its values, none where the drawing's own stands for all; each checked as that is."""
        counts = _numbers(steps, "number of steps") if steps.strip() else []
        strengths = _numbers(guidances, "guidance") if guidances.strip() else []
        # One of the three at a time, in the place of the field's value: the negative prompt is before them.
        for place, values in enumerate((counts, strengths, samplers), start=1):
            for value in values:
                how: list[Any] = [*drawing]
                how[place] = value
                self._site.drawing(*how)
        return {"steps": list(map(int, counts)), "guidance": strengths, "sampler": list(samplers)}

    def _draw(self, *asked: Any) -> Iterator[dict[gr.components.Component, Any]]:
        planned = self._planned(*asked)
        pictures = len(planned.recipe.grid)
        yield {
            self.status: progress("Starting.", 0.0),
            self.sheet: None,
            self.gallery: None,
            self.download: gr.DownloadButton(value=None, interactive=False),
        }
        with self._site.lent_folder() as folder:
            shown: list[tuple[str, str]] = []
            for event in self._site.studio.run(planned.jobs):
                if isinstance(event, Drawn):
                    shown += self._write(folder, planned, event)
                    yield {self.gallery: shown}
                else:
                    left = f"{len(shown)} of {pictures} pictures: about {event.seconds_left:.0f} s left."
                    yield {self.status: progress(left, event.fraction)}
            sheet = self._write_sheet(folder, planned)
            yield {
                self.status: progress(f"{pictures} pictures are drawn.", 1.0),
                self.sheet: gr.Image(str(sheet), alt_text=_described(planned.recipe.grid)),
                self.download: gr.DownloadButton(value=str(zipped(folder, "grid.zip")), interactive=True),
            }

    def _draw_for_programs(
        self,
        prompts: str,
        seeds: str,
        methods: list[str],
        scales: str,
        layout: str,
        negative_prompt: str,
        steps: int,
        guidance: float,
        sampler: str,
        width: int,
        height: int,
        several_steps: str,
        several_guidances: str,
        several_samplers: list[str],
    ) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
        planned = self._planned(
            *(prompts, seeds, methods, scales, layout),
            *(negative_prompt, steps, guidance, sampler, width, height),
            *(several_steps, several_guidances, several_samplers),
        )
        cells = [cell for row in planned.recipe.grid.table() for cell in row]
        made = [json.loads(sidecar(self._stamp(cell, planned.recipe))) for cell in cells]
        with self._site.lent_folder() as folder:
            for event in self._site.studio.run(planned.jobs):
                if isinstance(event, Drawn):
                    self._write(folder, planned, event)
            files = [self._write_sheet(folder, planned), *(folder / cell.file for cell in cells)]
            yield [str(file) for file in files], made

    def _write(self, folder: Path, planned: _Planned, done: Drawn) -> list[tuple[str, str]]:
        """Write the pictures of a batch; their files and captions."""
        shown = []
        for cell, picture in zip(planned.batches[done.job], done.pictures, strict=True):
            file = folder / cell.file
            file.write_bytes(png(picture, self._stamp(cell, planned.recipe)))
            told = "".join(f", {axis} {value}" for axis, value in cell.settings)
            shown.append((str(file), f"{cell.method.label}{told}, seed {cell.seed}: {cell.prompt}"))
        return shown

    def _write_sheet(self, folder: Path, planned: _Planned) -> Path:
        studio, recipe = self._site.studio, planned.recipe
        sampler = studio.sampler(recipe.drawing)
        hashes = {label: facts.sha256 for label, facts in studio.adapters.items()}
        file = folder / "sheet.png"
        file.write_bytes(sheet_png(recipe, recipe.sheet(folder, sampler).draw(), sampler, hashes))
        return file

    def _stamp(self, cell: Cell, recipe: Recipe) -> Stamp:
        method = cell.method
        return self._site.studio.stamp(
            method.adapter or BASE, cell.prompt, cell.seed, cell.drawing(recipe.drawing), method.scale
        )


def _adapter(method: str) -> str | None:
    return None if method == BASE else method


def _numbers(text: str, name: str) -> list[float]:
    words = text.replace(",", " ").split()
    if not words:
        raise refusal(f"Give at least one {name}.")
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise refusal(f"Each {name} must be a number, with spaces between them.") from error


def _seeds(text: str) -> list[int]:
    """Whole numbers, and ranges of them such as 0-7."""
    seeds: list[int] = []
    for word in text.replace(",", " ").split():
        first, _, last = word.partition("-")
        ends = [int(end) for end in (first, last or first) if end.isdecimal() and len(end) <= 10]
        if len(ends) < 2 or word.endswith("-") or not ends[0] <= ends[1] <= MAX_SEED:
            raise refusal(f"{word[:30]}: a seed is a whole number from 0 to {MAX_SEED}, or a range as 0-7.")
        if len(seeds) + ends[1] - ends[0] >= MAX_PICTURES:
            raise refusal(f"More than {MAX_PICTURES} seeds; this page draws at most so many pictures.")
        seeds += range(ends[0], ends[1] + 1)
    if not seeds:
        raise refusal("Give at least one seed.")
    return seeds


def _described(grid: Grid) -> str:
    """The sheet in words."""
    methods = ", ".join(method.label for method in grid.methods)
    seeds = ", ".join(map(str, grid.seeds))
    return f"A sheet of {'; '.join(grid.prompts)}, drawn by {methods} with seeds {seeds}"
