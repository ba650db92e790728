"""The tab that draws one prompt and seed with every method, and shows any two of them over each other."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.app.compare_api import connect_compare_api
from flatlora_diffusion.app.comparison import SETTINGS, Asked, Comparison, Shelf, setting_names
from flatlora_diffusion.app.engine import Drawn
from flatlora_diffusion.app.files import forget, zipped
from flatlora_diffusion.app.first import FirstComparison, comparison_jobs, drawn_comparison
from flatlora_diffusion.app.limits import DRAWS, MAX_SCALE, MAX_SEED, PRIVATE
from flatlora_diffusion.app.links import COMPARE_IF_LINKED, Field, from_link
from flatlora_diffusion.app.results import Results, Update
from flatlora_diffusion.app.site import Site, check_part, check_prompt, check_scale, check_seed, warn_of_cut
from flatlora_diffusion.app.stage import stage
from flatlora_diffusion.app.widgets import preset_prompts, progress, stop_button

_AT_ONCE = 0.05  # seconds: then nothing was drawn
_FIRST_EVERY = 2.0  # seconds between looks for the first comparison


class CompareTab:
    """Builds the tab in the current context.

    Args:
        site: Draws.
        page: Around it: its `load` event fills the tab from a link, or with the first comparison.
        first: What the page opens with.
    """

    def __init__(self, site: Site, page: gr.Blocks, first: FirstComparison) -> None:
        self._site = site
        self._first = first
        self._methods = site.studio.methods
        self._opened = Shelf((first.ready,)) if first.ready else Shelf()
        self._results = Results(site, self._opened)
        if site.verdict:
            gr.HTML(f"<p>{site.verdict}</p>", elem_id="verdict", elem_classes="lead")
        if taught := site.references.strip():
            gr.HTML(taught, elem_id="taught", elem_classes="thumbnails")
        with gr.Row(equal_height=False, elem_id="compare-top"):
            with gr.Column(scale=7, min_width=320, elem_id="results"):
                self._build_stage()
            with gr.Column(scale=5, min_width=300):
                self._build_settings()
        self._results.build_pictures()
        self._results.build_difference(str(self.left.value), str(self.right.value))
        self._connect(page)

    def _build_stage(self) -> None:
        left, right = self._methods[-2:][0], self._methods[-1]
        stage(self._methods, left, right, "picture-", self._site.small)
        self.status = gr.HTML(progress(self._opening_words), elem_id="status")
        self._results.build_figure(left, right)

    def _build_settings(self) -> None:
        site, methods = self._site, list(self._methods)
        first = next(iter(site.presets.values()), [""])[0]
        self.prompt = gr.Textbox(
            first,
            label="Prompt",
            info=_named_style(site.references.subject) + "Enter compares, Shift+Enter begins a new line.",
            lines=2,
            elem_id="prompt",
        )
        with gr.Row():
            self.compare_button = gr.Button("Compare", variant="primary", elem_id="compare", min_width=120)
            self.stop_button = stop_button("stop")
        preset_prompts(site.presets, self.prompt, "compare")
        with gr.Row():
            self.left = gr.Dropdown(methods, value=methods[-2:][0], label="Left side", min_width=120)
            self.right = gr.Dropdown(methods, value=methods[-1], label="Right side", min_width=120)
        with gr.Row(elem_classes="beside-field"):
            # Without `precision`: that would round what is typed, and not say so.
            self.seed = gr.Number(
                0,
                label="Seed",
                info="The random start: another number, another picture.",
                step=1,
                minimum=0,
                maximum=MAX_SEED,
                elem_id="seed",
                min_width=140,
            )
            self.random_button = gr.Button("Random seed", size="md", scale=0, elem_id="random", min_width=140)
        self.scale = gr.Slider(
            0,
            MAX_SCALE,
            1,
            step=0.05,
            label="Scale of the adapters",
            info="How much of what was learnt (the adapter) is added to the base: 0 nothing, 1 as trained.",
        )
        self._parts = [
            gr.Slider(-MAX_SCALE, MAX_SCALE, scale, step=0.05, label=f"{label}: {_named(part.file)}")
            for label, adapter in site.studio.adapters.items()
            for part, scale in adapter.mix
        ]
        with gr.Accordion("More settings", open=False):
            self._drawing = site.drawing_fields()

    @property
    def _settings(self) -> list[Field]:
        """The fields, in the order of `setting_names`."""
        negative, steps, guidance, sampler, width, height = self._drawing
        first = [self.prompt, negative, self.seed, steps, guidance, self.scale, sampler, width, height]
        return [*first, *self._parts]

    def _connect(self, page: gr.Blocks) -> None:
        results, sides = self._results, [self.left, self.right]
        shown = [self.status, *results.components]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
        comparing = self.compare_button.click(
            self._compare,
            [*self._settings, *sides, results.shelf],
            shown,
            show_progress="full",
            show_progress_on=self.status,
            js="(...given) => { window.flatlora.compareBegins(); return given; }",
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        comparing.then(None, js="() => window.flatlora.compareEnds()", **PRIVATE)
        restore = {"fn": self._restored, "inputs": [results.shelf, *sides], "outputs": shown, **quiet}
        comparing.failure(**restore)
        stopped = self.stop_button.click(None, cancels=[comparing], queue=False, **PRIVATE)
        # Afterwards: what was still told of the drawing must not be the last word.
        restored = stopped.then(**restore)
        restored.then(None, js="() => window.flatlora.compareEnds()", **PRIVATE)
        self.random_button.click(
            lambda: secrets.randbelow(MAX_SEED + 1), None, self.seed, queue=False, **PRIVATE
        )
        gr.on(
            [side.input for side in sides],
            results.shown_pair,
            [results.shelf, *sides],
            results.pair,
            **quiet,
        )
        gr.on(
            [side.change for side in sides],
            None,
            sides,
            None,
            js="(left, right) => window.flatlora.sides(left, right)",
            **PRIVATE,
        )
        link = results.link
        gr.on(
            [link.change, *(field.change for field in self._settings)],
            None,
            [*self._settings, link],
            None,
            js="(...given) => window.flatlora.matches(...given)",
            **PRIVATE,
        )
        link.change(None, link, link, js="(link) => window.flatlora.showLink(link)", **PRIVATE)
        results.strip.select(self._show_again, [results.shelf, *sides], [*self._settings, *shown], **quiet)
        filled = page.load(self._fill, None, [*self._settings, *sides, *shown], **quiet)
        filled.then(None, link, link, js=COMPARE_IF_LINKED, **PRIVATE)
        if self._first.coming:
            timer = gr.Timer(_FIRST_EVERY)
            look = partial(self._first_has_come, timer)
            timer.tick(look, [results.shelf, *sides], [*shown, timer], **quiet)
        draw = partial(drawn_comparison, self._site)
        connect_compare_api(self._site, self._settings[: len(SETTINGS)], self._asked, draw)

    # Handlers.

    def _asked(
        self,
        prompt: str,
        negative: str,
        seed: float,
        steps: int,
        guidance: float,
        scale: float,
        sampler: str,
        width: int,
        height: int,
        *parts: float,
    ) -> Asked:
        drawing = self._site.drawing(negative, steps, guidance, sampler, width, height)
        mixes = self._site.studio.mixes
        if parts:
            scales = iter([check_part(part) for part in parts])
            mixes = tuple((label, tuple(itertools.islice(scales, len(own)))) for label, own in mixes)
        asked = Asked(check_prompt(prompt), check_seed(seed), drawing, check_scale(scale), mixes)
        warn_of_cut(self._site.studio, prompt, negative)
        return asked

    def _compare(self, *given: Any) -> Iterator[Update]:
        *settings, left, right, shelf = given
        asked = self._asked(*settings)
        yield {self.status: progress("Starting.", 0.0)}
        folder = self._site.new_folder()
        files: dict[str, Path] = {}
        seconds: dict[str, float] = {}
        try:
            for event in self._site.studio.run(comparison_jobs(self._methods, asked)):
                method = self._methods[event.job]
                if isinstance(event, Drawn):
                    made = asked.made(method)
                    files[method], _ = self._site.picture_files(folder, event.pictures[0], *made)
                    seconds[method] = event.seconds
                    yield self._results.picture(asked, method, files[method], event.seconds)
                else:
                    told = f"Drawing {method}: about {event.seconds_left:.0f} s left for all."
                    sketched = self._results.sketch(method, event.sketches[0])
                    yield {self.status: progress(told, event.fraction), **sketched}
            comparison = Comparison(asked, files, seconds, zipped(folder, "comparison.zip"))
        except BaseException:  # it was stopped, or failed
            forget([folder])
            raise
        took = sum(seconds.values())
        told = f"Done in {took:.1f} s." if took >= _AT_ONCE else "Done: all of it was drawn before."
        shown = self._results.shown(shelf.with_new(comparison), left, right)
        yield {**shown, self.status: progress(told)}

    def _restored(self, shelf: Shelf, left: str, right: str) -> Update:
        """As it was before the drawing that ended early: whole, or nothing."""
        after = " The last comparison is shown again." if shelf.current else ""
        return {**self._results.shown(shelf, left, right), self.status: progress(f"Stopped.{after}")}

    def _show_again(self, shelf: Shelf, left: str, right: str, event: gr.SelectData) -> Update:
        index = event.index if isinstance(event.index, int) else 0
        if not 0 <= index < len(shelf.kept):
            return {self.status: gr.skip()}
        values = shelf.kept[index].asked.fields()
        return {
            **dict(zip(self._settings, values, strict=True)),
            **self._results.shown(shelf.showing(index), left, right),
            self.status: progress("Shown again."),
        }

    # What the page opens with.

    def _fill(self, request: gr.Request) -> Update:
        """What a page shows that opens: the settings of its link, else the first comparison.

        Settings that the link doesn't name, and bad ones, stay as they are.
        """
        query = dict(request.query_params)
        left_out: list[str] = []
        names = setting_names(len(self._settings))
        fields = dict(zip(names, self._settings, strict=True)) | {"left": self.left, "right": self.right}
        update: Update = {
            field: from_link(query.get(name), field, name, left_out) for name, field in fields.items()
        }
        if left_out:
            # In the status: a warning would need the queue, which may be full.
            told = f"Left out of the link, for this page has no such: {', '.join(left_out)}."
            update[self.status] = progress(told)
        elif not self._is_first(query):
            return update
        wanted = {"left": query.get("left"), "right": query.get("right")}
        left, right = (
            method if method in self._methods else str(getattr(self, side).value)
            for side, method in wanted.items()
        )
        if self._opened.kept:  # its pictures are in the page already
            update |= self._results.shown_pair(self._opened, left, right)
        elif not left_out:
            update |= self._opening(left, right)
        return update

    def _is_first(self, query: dict[str, str]) -> bool:
        """Whether a link is to what the page opens with anyway: the bare address, or as it is then shown."""
        names = setting_names(len(self._settings))
        if not any(name in query for name in names):
            return True
        first = self._first.ready
        link = parse_qs(first.asked.link("", "")[1:], keep_blank_values=True) if first else {}
        return bool(first) and all(query.get(name) == link[name][0] for name in names)

    @property
    def _opening_words(self) -> str:
        if self._first.ready:
            return "This picture was drawn beforehand. Try your own prompt."
        return "The first comparison is being drawn." if self._first.coming else "Press Compare."

    def _opening(self, left: str, right: str) -> Update:
        first = self._first.ready
        shown = self._results.shown(Shelf((first,)), left, right) if first else {}
        return {**shown, self.status: progress(self._opening_words)}

    def _first_has_come(self, timer: gr.Timer, shelf: Shelf, left: str, right: str) -> Update:
        """Shows the first comparison where nothing else is shown yet; then nobody asks again."""
        if self._first.coming:
            return {timer: gr.skip()}
        update: Update = {timer: gr.Timer(active=False)}
        return update if shelf.kept else {**update, **self._opening(left, right)}


def _named_style(subject: str | None) -> str:
    """What a prompt needs to ask for the taught style."""
    if not subject:
        return ""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{subject}\N{RIGHT DOUBLE QUOTATION MARK} names the taught style. "


def _named(file: Path) -> str:
    """What the page calls an adapter's file: without its folders."""
    return file.parent.name if file.name == WEIGHTS_NAME else file.stem
