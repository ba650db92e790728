"""The tab that draws one prompt and seed with every method, and shows any two of them over each other."""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.files import KEPT_SECONDS, forget, zipped
from flatlora_diffusion.app.limits import DRAWS, MAX_SCALE, MAX_SEED, PRIVATE
from flatlora_diffusion.app.links import COMPARE_IF_LINKED, SHOW_LINK, Field, from_link
from flatlora_diffusion.app.site import Site, check_prompt, check_scale, check_seed, warn_of_cut
from flatlora_diffusion.app.widgets import connect_stop, preset_prompts, progress, scrolled_to
from flatlora_diffusion.draw.difference import difference
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.stamp import BASE


@dataclass(frozen=True)
class _Asked:
    """A comparison that was asked for, checked."""

    prompt: str
    seed: int
    drawing: Drawing
    scale: float

    def link(self, left: str, right: str) -> str:
        """The query that opens the page with this comparison."""
        drawing = self.drawing
        return "?" + urlencode(
            {
                "prompt": self.prompt,
                "negative_prompt": drawing.negative_prompt or "",
                "seed": self.seed,
                "steps": drawing.steps,
                "guidance": f"{drawing.guidance:g}",
                "scale": f"{self.scale:g}",
                "sampler": drawing.sampler,
                "width": drawing.width,
                "height": drawing.height,
                "left": left,
                "right": right,
            }
        )


class CompareTab:
    """Builds the tab in the current context.

    Args:
        site: Draws.
        page: Around it: its `load` event fills the tab from a link.
    """

    def __init__(self, site: Site, page: gr.Blocks) -> None:
        self._site = site
        self._methods = site.studio.methods
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self._build_settings()
            with gr.Column(scale=7, min_width=320, elem_id="results"):
                self._build_results()
        self._connect(page)

    def _build_settings(self) -> None:
        site = self._site
        first = next(iter(site.presets.values()), [""])[0]
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            self.compare_button = gr.Button("Compare", variant="primary", elem_id="compare", min_width=120)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
        preset_prompts(site.presets, self.prompt)
        with gr.Row(elem_classes="beside-field"):
            self.seed = gr.Number(
                # Without `precision`: that would round what is typed, and not say so.
                0,
                label="Seed",
                step=1,
                minimum=0,
                maximum=MAX_SEED,
                elem_id="seed",
                min_width=140,
            )
            self.random_button = gr.Button("Random seed", size="md", scale=0, elem_id="random", min_width=140)
        self.scale = gr.Slider(0, MAX_SCALE, 1, step=0.05, label="Scale of the adapters")
        with gr.Accordion("More settings", open=False):
            self._drawing = site.drawing_fields()

    def _build_results(self) -> None:
        methods, picture = list(self._methods), self._site.picture_class
        self.status = gr.HTML(progress("Press Compare."), elem_id="status")
        with gr.Row():
            self.left = gr.Dropdown(methods, value=methods[-2:][0], label="Left side", min_width=120)
            self.right = gr.Dropdown(methods, value=methods[-1], label="Right side", min_width=120)
        self.slider = gr.ImageSlider(
            format="png",
            type="filepath",
            interactive=False,
            label="Left and right over each other",
            elem_id="slider",
            elem_classes=[*picture, "large"],
            buttons=["fullscreen"],
            max_height=512,
        )
        self.divider = gr.Slider(0, 100, 50, step=1, label="Divider, in percent", elem_id="divider")
        self.pictures: dict[str, gr.Image] = {}
        self.captions: dict[str, gr.Markdown] = {}
        with gr.Row():
            for method in methods:
                with gr.Column(min_width=200):
                    self.pictures[method] = gr.Image(
                        format="png",
                        label=method,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_classes=picture,
                        alt_text=f"The picture of {method}: not drawn yet",
                    )
                    self.captions[method] = gr.Markdown("", elem_classes="caption")
        with gr.Row():
            with gr.Column(min_width=200):
                self.map = gr.Image(
                    format="png",
                    label="Difference of left and right",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_classes=picture,
                    alt_text="The difference of the two sides: not drawn yet",
                )
            with gr.Column(min_width=200):
                self.figure = gr.Markdown("", elem_id="figure")
                self.link = gr.Textbox(
                    "", label="Link to this comparison", interactive=False, buttons=["copy"], elem_id="link"
                )
                self.download = gr.DownloadButton(
                    "Download pictures and settings (ZIP)", interactive=False, elem_id="download"
                )
        # The last comparison: method -> file, and where the files are.
        self.drawn = gr.State(
            {},
            time_to_live=KEPT_SECONDS,
            delete_callback=lambda drawn: forget({file.parent for file in drawn.values()}),
        )

    @property
    def _settings(self) -> list[Field]:
        negative, steps, guidance, sampler, width, height = self._drawing
        return [self.prompt, negative, self.seed, steps, guidance, self.scale, sampler, width, height]

    def _connect(self, page: gr.Blocks) -> None:
        sides = [self.left, self.right]
        pair = [self.slider, self.map, self.figure]
        every_result = [
            *(self.status, self.link, self.download, self.drawn, *pair),
            *self.pictures.values(),
            *self.captions.values(),
        ]
        comparing = gr.on(
            [self.compare_button.click, self.prompt.submit],
            self._compare,
            [*self._settings, *sides, self.drawn],
            every_result,
            show_progress="full",
            show_progress_on=self.status,
            js=scrolled_to("results"),
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        comparing.success(None, self.link, self.link, js=SHOW_LINK, **PRIVATE)
        comparing.success(None, sides, None, js=_DESCRIBE_SLIDER, **PRIVATE)
        connect_stop(self.stop_button, self.status, [comparing])
        self.random_button.click(
            lambda: secrets.randbelow(MAX_SEED + 1), None, self.seed, queue=False, **PRIVATE
        )
        shown = gr.on(
            [side.input for side in sides],
            self._show_pair,
            [self.drawn, *sides],
            pair,
            show_progress="hidden",
            queue=False,
            **PRIVATE,
        )
        shown.success(None, sides, None, js=_DESCRIBE_SLIDER, **PRIVATE)
        self.divider.change(
            lambda percent: gr.ImageSlider(slider_position=percent),
            self.divider,
            self.slider,
            show_progress="hidden",
            queue=False,
            **PRIVATE,
        )
        filled = page.load(self._fill, None, [*self._settings, *sides, self.status], queue=False, **PRIVATE)
        filled.then(None, js=COMPARE_IF_LINKED, **PRIVATE)
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
    ) -> _Asked:
        drawing = self._site.drawing(negative, steps, guidance, sampler, width, height)
        warn_of_cut(self._site.studio, prompt, negative)
        return _Asked(check_prompt(prompt), check_seed(seed), drawing, check_scale(scale))

    def _jobs(self, asked: _Asked) -> list[Job]:
        return [
            Job(method, [(asked.prompt, asked.seed)], asked.drawing, asked.scale) for method in self._methods
        ]

    def _compare(self, *given: Any) -> Iterator[dict[gr.components.Component, Any]]:
        *settings, left, right, before = given
        asked = self._asked(*settings)
        yield {
            self.status: progress("Starting.", 0.0),
            self.slider: None,
            self.map: None,
            self.figure: "",
            self.link: "",
            self.download: gr.DownloadButton(value=None, interactive=False),
            **dict.fromkeys(self.captions.values(), ""),
        }
        folder = self._site.new_folder()
        drawn: dict[str, Path] = {}
        try:
            seconds = yield from self._draw_one_by_one(asked, folder, drawn)
            yield {
                self.status: progress(f"Done in {seconds:.1f} s.", 1.0),
                **self._show_pair(drawn, left, right),
                self.download: gr.DownloadButton(
                    value=str(zipped(folder, "comparison.zip")), interactive=True
                ),
                self.link: asked.link(left, right),
                self.drawn: drawn,
            }
        except BaseException:  # it was stopped, or failed
            forget([folder])
            raise
        forget({file.parent for file in before.values()})

    def _draw_one_by_one(
        self, asked: _Asked, folder: Path, drawn: dict[str, Path]
    ) -> Generator[dict[gr.components.Component, Any], None, float]:
        """Show how each picture comes into being, write it into the folder, and note it in `drawn`.

        Returns:
            The seconds that it took.
        """
        total = 0.0
        for event in self._site.studio.run(self._jobs(asked)):
            method = self._methods[event.job]
            if not isinstance(event, Drawn):
                told = f"Drawing {method}: about {event.seconds_left:.0f} s left for all."
                yield {
                    self.status: progress(told, event.fraction),
                    self.pictures[method]: event.sketches[0],
                }
                continue
            total += event.seconds
            made = (method, asked.prompt, asked.seed, asked.drawing, asked.scale)
            drawn[method], _ = self._site.picture_files(folder, event.pictures[0], *made)
            yield {
                self.pictures[method]: gr.Image(
                    str(drawn[method]), alt_text=f'"{asked.prompt}" drawn by {method} with seed {asked.seed}'
                ),
                self.captions[method]: f"{event.seconds:.1f} s  \n{self._site.caption(*made)}",
            }
        return total

    def _show_pair(
        self, drawn: Mapping[str, Path], left: str, right: str
    ) -> dict[gr.components.Component, Any]:
        if left not in drawn or right not in drawn:
            return {self.slider: None, self.map: None, self.figure: ""}
        with Image.open(drawn[left]) as one, Image.open(drawn[right]) as other:
            found = difference(one.convert("RGB"), other.convert("RGB"))
        figure = (
            f"**{html.escape(left)} and {html.escape(right)} differ by {found.mean_percent:.1f}%** of the "
            f"full range on average; {found.changed_percent:.0f}% of the pixels differ visibly."
        )
        return {
            self.slider: (str(drawn[left]), str(drawn[right])),
            self.map: gr.Image(found.picture, alt_text=f"Where {left} and {right} differ: bright is more"),
            self.figure: figure,
        }

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
            for event in self._site.studio.run(self._jobs(asked)):
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

    def _fill(self, request: gr.Request) -> list[Any]:
        """The settings that a link names, and a status; other settings, and bad ones, stay as they are."""
        query = dict(request.query_params)
        values: list[Any] = []
        left_out: list[str] = []
        names = (
            "prompt",
            "negative_prompt",
            "seed",
            "steps",
            "guidance",
            "scale",
            "sampler",
            "width",
            "height",
        )
        for name, component in zip(names, self._settings, strict=True):
            values.append(from_link(query.get(name), component, name, left_out))
        values += [
            from_link(query.get(side), getattr(self, side), side, left_out) for side in ("left", "right")
        ]
        # In the status: a warning would need the queue, which may be full.
        told = f"Left out of the link, for this page has no such: {', '.join(left_out)}."
        return [*values, progress(told) if left_out else gr.skip()]


# Gradio gives the slider's pictures no alternative texts.
_DESCRIBE_SLIDER = """(left, right) => {
    setTimeout(() => document.querySelectorAll("#slider img").forEach((img, i) => {
        img.alt = i ? `Right: ${right}` : `Left: ${left}`;
    }), 200);
}"""
