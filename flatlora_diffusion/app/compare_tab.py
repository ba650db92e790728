"""The tab that draws one prompt and seed with every method, and shows any two of them over each other."""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.comparison import MOST_KEPT, SETTINGS, Asked, Comparison, Shelf
from flatlora_diffusion.app.difference_text import difference_text, same_text, scale_html
from flatlora_diffusion.app.engine import Drawn
from flatlora_diffusion.app.files import KEPT_SECONDS, forget, zipped
from flatlora_diffusion.app.first import FirstComparison, comparison_jobs
from flatlora_diffusion.app.limits import DRAWS, MAX_SCALE, MAX_SEED, PRIVATE
from flatlora_diffusion.app.links import COMPARE_IF_LINKED, Field, from_link
from flatlora_diffusion.app.references import true_picture
from flatlora_diffusion.app.site import Site, check_prompt, check_scale, check_seed, warn_of_cut
from flatlora_diffusion.app.stage import stage
from flatlora_diffusion.app.widgets import preset_prompts, progress
from flatlora_diffusion.draw.difference import difference
from flatlora_diffusion.draw.stamp import BASE

_Update = dict[gr.components.Component, Any]

_NO_MAP = "The difference of the two sides: not drawn"
_NOT_DRAWN = "The picture of {}: not drawn yet"
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
        # What is there already is in the page from the start: nothing has to be asked for.
        self._opened = Shelf((first.ready,)) if first.ready else Shelf()
        with gr.Row(equal_height=False, elem_id="compare-top"):
            with gr.Column(scale=7, min_width=320, elem_id="results"):
                self._build_stage()
            with gr.Column(scale=5, min_width=300):
                self._build_settings()
        self._build_results()
        self._connect(page)

    def _build_stage(self) -> None:
        site, methods = self._site, self._methods
        stage(methods, methods[-2:][0], methods[-1], "picture-", site.small)
        self.status = gr.HTML(progress(self._opening_words), elem_id="status")
        if taught := site.references.strip():
            gr.HTML(taught, elem_id="taught", elem_classes="thumbnails")

    def _build_settings(self) -> None:
        site, methods = self._site, list(self._methods)
        first = next(iter(site.presets.values()), [""])[0]
        self.prompt = gr.Textbox(
            first,
            label="Prompt",
            info="Enter compares, Shift+Enter begins a new line.",
            lines=2,
            elem_id="prompt",
        )
        with gr.Row():
            self.compare_button = gr.Button("Compare", variant="primary", elem_id="compare", min_width=120)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
        with gr.Row():
            self.left = gr.Dropdown(methods, value=methods[-2:][0], label="Left side", min_width=120)
            self.right = gr.Dropdown(methods, value=methods[-1], label="Right side", min_width=120)
        self._presets = preset_prompts(site.presets, self.prompt)
        with gr.Row(elem_classes="beside-field"):
            # Without `precision`: that would round what is typed, and not say so.
            self.seed = gr.Number(
                0, label="Seed", step=1, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=140
            )
            self.random_button = gr.Button("Random seed", size="md", scale=0, elem_id="random", min_width=140)
        self.scale = gr.Slider(0, MAX_SCALE, 1, step=0.05, label="Scale of the adapters")
        with gr.Accordion("More settings", open=False):
            self._drawing = site.drawing_fields()

    def _build_results(self) -> None:
        picture, current = self._site.picture_class, self._opened.current
        self.pictures: dict[str, gr.Image] = {}
        self.captions: dict[str, gr.Markdown] = {}
        with gr.Row(elem_id="pictures"):
            for index, method in enumerate(self._methods):
                with gr.Column(min_width=140):
                    self.pictures[method] = gr.Image(
                        str(current.files[method]) if current else None,
                        format="png",
                        label=method,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id=f"picture-{index}",
                        elem_classes=picture,
                        alt_text=self._alt(current.asked, method) if current else _NOT_DRAWN.format(method),
                    )
                    self.captions[method] = gr.Markdown(
                        self._caption(current.asked, method, current.seconds[method]) if current else "",
                        elem_classes="caption",
                    )
            self.truth, self.truth_caption = None, None
            if self._site.references.trained or self._site.references.heldout:
                with gr.Column(min_width=140):
                    true, alt, caption = self._true(current.asked.prompt if current else "")
                    self.truth = gr.Image(
                        true,
                        format="png",
                        label="The true picture",
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id="truth",
                        elem_classes=picture,
                        alt_text=alt,
                    )
                    self.truth_caption = gr.Markdown(caption, elem_classes="caption")
        map_, figure, link = self._difference(current, self.left.value, self.right.value)
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                self.map = gr.Image(
                    map_,
                    format="png",
                    label="Where left and right differ",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="map",
                    elem_classes=picture,
                    alt_text=_NO_MAP,
                )
                gr.HTML(scale_html())
            with gr.Column(scale=2, min_width=300):
                self.figure = gr.HTML(figure, elem_id="figure")
                self.link = gr.Textbox(
                    link, label="Link to this comparison", interactive=False, buttons=["copy"], elem_id="link"
                )
                self.download = gr.DownloadButton(
                    "Download pictures and settings (ZIP)",
                    value=str(current.archive) if current else None,
                    interactive=current is not None,
                    elem_id="download",
                )
                self.strip = gr.Gallery(
                    label="Your last comparisons: click one to go back to it",
                    columns=MOST_KEPT,
                    height=150,
                    object_fit="contain",
                    format="png",
                    allow_preview=False,
                    interactive=False,
                    visible=False,
                    buttons=[],
                    elem_id="strip",
                    elem_classes=picture,
                )
        self.shelf = gr.State(self._opened, time_to_live=KEPT_SECONDS, delete_callback=Shelf.forget)

    @property
    def _settings(self) -> list[Field]:
        """The fields, in the order of `SETTINGS`."""
        negative, steps, guidance, sampler, width, height = self._drawing
        return [self.prompt, negative, self.seed, steps, guidance, self.scale, sampler, width, height]

    @property
    def _pair(self) -> list[gr.components.Component]:
        return [self.map, self.figure, self.link]

    @property
    def _results(self) -> list[gr.components.Component]:
        """All that shows a comparison."""
        truth = [self.truth, self.truth_caption] if self.truth and self.truth_caption else []
        pictures = [*self.pictures.values(), *self.captions.values()]
        return [self.status, self.download, self.strip, self.shelf, *self._pair, *truth, *pictures]

    def _connect(self, page: gr.Blocks) -> None:
        sides = [self.left, self.right]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
        comparing = self.compare_button.click(
            self._compare,
            [*self._settings, *sides, self.shelf],
            self._results,
            show_progress="full",
            show_progress_on=self.status,
            js="(...given) => { window.flatlora.compareBegins(); return given; }",
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        comparing.then(None, js="() => window.flatlora.compareEnds()", **PRIVATE)
        restore = {"fn": self._restored, "inputs": [self.shelf, *sides], "outputs": self._results, **quiet}
        comparing.failure(**restore)
        stopped = self.stop_button.click(None, cancels=[comparing], queue=False, **PRIVATE)
        # Afterwards: what was still told of the drawing must not be the last word.
        restored = stopped.then(**restore)
        restored.then(None, js="() => window.flatlora.compareEnds()", **PRIVATE)
        self.random_button.click(
            lambda: secrets.randbelow(MAX_SEED + 1), None, self.seed, queue=False, **PRIVATE
        )
        for preset in self._presets:
            preset.then(None, js='() => document.getElementById("compare").click()', **PRIVATE)
        gr.on([side.input for side in sides], self._show_pair, [self.shelf, *sides], self._pair, **quiet)
        gr.on(
            [side.change for side in sides],
            None,
            sides,
            None,
            js="(left, right) => window.flatlora.sides(left, right)",
            **PRIVATE,
        )
        gr.on(
            [self.link.change, *(field.change for field in self._settings)],
            None,
            [*self._settings, self.link],
            None,
            js="(...given) => window.flatlora.matches(...given)",
            **PRIVATE,
        )
        self.link.change(None, self.link, self.link, js="(link) => window.flatlora.showLink(link)", **PRIVATE)
        self.strip.select(self._show_again, [self.shelf, *sides], [*self._settings, *self._results], **quiet)
        filled = page.load(self._fill, None, [*self._settings, *sides, *self._results], **quiet)
        filled.then(None, self.link, self.link, js=COMPARE_IF_LINKED, **PRIVATE)
        if self._first.coming:
            timer = gr.Timer(_FIRST_EVERY)
            look = partial(self._first_has_come, timer)
            timer.tick(look, [self.shelf, *sides], [*self._results, timer], **quiet)
        self._connect_api()

    def _connect_api(self) -> None:
        """`/compare` without previews, and what a program needs to know beforehand as `/methods`."""
        pictures = gr.Files(visible=False)
        facts = gr.JSON(visible=False)
        gr.Button(visible=False).click(
            self._compare_for_programs,
            self._settings,
            [pictures, facts],
            api_name="compare",
            api_description="Draw a prompt and seed with the base and every adapter: PNGs and their JSON.",
            **DRAWS,
        )
        gr.Button(visible=False).click(
            self._describe_methods,
            None,
            facts,
            queue=False,
            api_name="methods",
            api_description="What the methods are: rank, alpha, hash of each adapter.",
        )

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
    ) -> Asked:
        drawing = self._site.drawing(negative, steps, guidance, sampler, width, height)
        asked = Asked(check_prompt(prompt), check_seed(seed), drawing, check_scale(scale))
        warn_of_cut(self._site.studio, prompt, negative)
        return asked

    def _compare(self, *given: Any) -> Iterator[_Update]:
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
                    made = (method, asked.prompt, asked.seed, asked.drawing, asked.scale)
                    files[method], _ = self._site.picture_files(folder, event.pictures[0], *made)
                    seconds[method] = event.seconds
                    yield self._picture(asked, method, files[method], event.seconds)
                else:
                    told = f"Drawing {method}: about {event.seconds_left:.0f} s left for all."
                    yield {
                        self.status: progress(told, event.fraction),
                        self.pictures[method]: event.sketches[0],
                    }
            comparison = Comparison(asked, files, seconds, zipped(folder, "comparison.zip"))
        except BaseException:  # it was stopped, or failed
            forget([folder])
            raise
        shelf = shelf.with_new(comparison)
        took = sum(seconds.values())
        told = f"Done in {took:.1f} s." if took >= _AT_ONCE else "Done: all of it was drawn before."
        yield {**self._shown(shelf, left, right), self.status: progress(told)}

    def _picture(self, asked: Asked, method: str, file: Path, seconds: float) -> _Update:
        return {
            self.pictures[method]: gr.Image(str(file), alt_text=self._alt(asked, method)),
            self.captions[method]: self._caption(asked, method, seconds),
        }

    def _caption(self, asked: Asked, method: str, seconds: float) -> str:
        how = self._site.caption(method, asked.prompt, asked.seed, asked.drawing, asked.scale)
        return f"{html.escape(asked.prompt)}  \n{how}, {seconds:.1f} s"

    @staticmethod
    def _alt(asked: Asked, method: str) -> str:
        return f'"{asked.prompt}" drawn by {method} with seed {asked.seed}'

    def _shown(self, shelf: Shelf, left: str, right: str) -> _Update:
        """The current comparison of a shelf with all that belongs to it, or none of it."""
        comparison = shelf.current
        update: _Update = {self.shelf: shelf, **self._show_pair(shelf, left, right)}
        if comparison is None:
            update |= dict.fromkeys(self.captions.values(), "")
            for method, picture in self.pictures.items():
                update[picture] = gr.Image(None, alt_text=_NOT_DRAWN.format(method))
            update[self.download] = gr.DownloadButton(value=None, interactive=False)
            return update
        for method, file in comparison.files.items():
            update |= self._picture(comparison.asked, method, file, comparison.seconds[method])
        update[self.download] = gr.DownloadButton(value=str(comparison.archive), interactive=True)
        update |= self._show_truth(comparison.asked.prompt)
        last = [(str(kept.files[right]), kept.asked.prompt) for kept in shelf.kept]
        update[self.strip] = gr.Gallery(last, visible=len(last) > 1, selected_index=None)
        return update

    def _show_truth(self, prompt: str) -> _Update:
        if not self.truth or not self.truth_caption:
            return {}
        picture, alt, caption = self._true(prompt)
        return {self.truth: gr.Image(picture, alt_text=alt), self.truth_caption: caption}

    def _true(self, prompt: str) -> tuple[Image.Image | None, str, str]:
        """The picture that a prompt names, its alternative text and its caption."""
        found = self._site.references.truth(prompt)
        if found and (picture := true_picture(found[1])):
            told, example = found
            return picture, f"{told}: {example.caption}", f"{told}  \n{html.escape(example.caption)}"
        return None, "The true picture: none for this prompt", "No training or held-out picture is called so."

    def _restored(self, shelf: Shelf, left: str, right: str) -> _Update:
        """As it was before the drawing that ended early: whole, or nothing."""
        after = " The last comparison is shown again." if shelf.current else ""
        return {**self._shown(shelf, left, right), self.status: progress(f"Stopped.{after}")}

    def _show_again(self, shelf: Shelf, left: str, right: str, event: gr.SelectData) -> _Update:
        index = event.index if isinstance(event.index, int) else 0
        if not 0 <= index < len(shelf.kept):
            return {self.status: gr.skip()}
        shelf = shelf.showing(index)
        values = shelf.kept[index].asked.fields()
        return {
            **dict(zip(self._settings, values, strict=True)),
            **self._shown(shelf, left, right),
            self.status: progress("Shown again."),
        }

    def _show_pair(self, shelf: Shelf, left: str, right: str) -> _Update:
        picture, figure, link = self._difference(shelf.current, left, right)
        alt = f"Where {left} and {right} differ: bright is more" if picture else _NO_MAP
        return {self.map: gr.Image(picture, alt_text=alt), self.figure: figure, self.link: link}

    def _difference(
        self, comparison: Comparison | None, left: str, right: str
    ) -> tuple[Image.Image | None, str, str]:
        """The map of where two sides differ, what is said of it, and the link that shows them."""
        if comparison is None or left not in comparison.files or right not in comparison.files:
            return None, "", ""
        link = comparison.asked.link(left, right)
        adapters = self._site.studio.adapters
        one_file = left in adapters and right in adapters and adapters[left].sha256 == adapters[right].sha256
        if left == right or one_file:
            return None, same_text(left, right), link
        with Image.open(comparison.files[left]) as one, Image.open(comparison.files[right]) as other:
            found = difference(one.convert("RGB"), other.convert("RGB"))
        return found.picture, difference_text(left, right, found), link

    def _compare_for_programs(
        self,
        prompt: str,
        negative_prompt: str,
        seed: float,
        steps: int,
        guidance: float,
        scale: float,
        sampler: str,
        width: int,
        height: int,
    ) -> Iterator[tuple[list[str], dict[str, Any]]]:
        asked = self._asked(prompt, negative_prompt, seed, steps, guidance, scale, sampler, width, height)
        with self._site.lent_folder() as folder:
            files: list[str] = []
            facts: dict[str, Any] = {}
            for event in self._site.studio.run(comparison_jobs(self._methods, asked)):
                if isinstance(event, Drawn):
                    made = (self._methods[event.job], asked.prompt, asked.seed, asked.drawing, asked.scale)
                    png, sidecar = self._site.picture_files(folder, event.pictures[0], *made)
                    files.append(str(png))
                    told = json.loads(sidecar.read_text(encoding="utf-8"))
                    facts[made[0]] = {"seconds": event.seconds, **told}
            yield files, facts

    def _describe_methods(self) -> dict[str, Any]:
        described: dict[str, Any] = {BASE: {"name": self._site.studio.base}}
        for label, adapter in self._site.studio.adapters.items():
            described[label] = {
                "method": adapter.method,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "sha256": adapter.sha256,
                "layers": adapter.layers,
                "parameters": adapter.parameters,
            }
        return described

    def _fill(self, request: gr.Request) -> _Update:
        """What a page shows that opens: the settings of its link, else the first comparison.

        Settings that the link doesn't name, and bad ones, stay as they are.
        """
        query = dict(request.query_params)
        left_out: list[str] = []
        fields = dict(zip(SETTINGS, self._settings, strict=True)) | {"left": self.left, "right": self.right}
        update: _Update = {
            field: from_link(query.get(name), field, name, left_out) for name, field in fields.items()
        }
        if left_out:
            # In the status: a warning would need the queue, which may be full.
            told = f"Left out of the link, for this page has no such: {', '.join(left_out)}."
            update[self.status] = progress(told)
        elif self._is_first(query):
            left, right = (query.get(side) or getattr(self, side).value for side in ("left", "right"))
            update |= self._show_pair(self._opened, left, right) if self._opened.kept else {}
            update |= {} if self._opened.kept else self._opening(left, right)
        return update

    def _is_first(self, query: dict[str, str]) -> bool:
        """Whether a link is to what the page opens with anyway: the bare address, or as it is then shown."""
        if not any(name in query for name in SETTINGS):
            return True
        first = self._first.ready
        link = parse_qs(first.asked.link("", "")[1:], keep_blank_values=True) if first else {}
        return bool(first) and all(query.get(name) == link[name][0] for name in SETTINGS)

    @property
    def _opening_words(self) -> str:
        if self._first.ready:
            return "Drawn beforehand. Change anything, and press Compare."
        return "The first comparison is being drawn." if self._first.coming else "Press Compare."

    def _opening(self, left: str, right: str) -> _Update:
        shown = self._shown(Shelf((self._first.ready,)), left, right) if self._first.ready else {}
        return {**shown, self.status: progress(self._opening_words)}

    def _first_has_come(self, timer: gr.Timer, shelf: Shelf, left: str, right: str) -> _Update:
        """Shows the first comparison where nothing else is shown yet; then nobody asks again."""
        if self._first.coming:
            return {timer: gr.skip()}
        update: _Update = {timer: gr.Timer(active=False)}
        return update if shelf.kept else {**update, **self._opening(left, right)}
