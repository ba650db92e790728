"""The tab that shakes the merged weights of each method alike, and shows whose pictures hold."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.limits import DRAWS, MAX_SEED, PRIVATE
from flatlora_diffusion.app.site import (
    Site,
    check_draw,
    check_prompt,
    check_seed,
    check_sigma,
    refusal,
    warn_of_cut,
)
from flatlora_diffusion.app.widgets import connect_stop, preset_prompts, progress, scrolled_to, stop_button
from flatlora_diffusion.draw.difference import difference
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.draw.shaken import Shake

MAX_SIGMA = 0.5

_NOISE = "Random noise"
_KINDS = {_NOISE: None, "Rounded to 8 bits": 8, "Rounded to 4 bits": 4, "Rounded to 3 bits": 3}
_SIGMA = 0.2  # first: with less, little is to be seen on a small base

_Update = dict[gr.components.Component, Any]


class ShakeTab:
    """Builds the tab in the current context.

    Args:
        site: Draws.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._methods = site.studio.methods
        gr.HTML(
            "<p>A model is flat where small changes of its weights do little. Here the weights of each "
            "method get the same change: see whose picture holds. Above as it is, below shaken.</p>",
            elem_classes="lead",
        )
        with gr.Row(equal_height=False, elem_id="shake-top"):
            with gr.Column(scale=7, min_width=320, elem_id="shake-results"):
                self._build_results()
            with gr.Column(scale=5, min_width=300):
                self._build_settings()
        self._connect()

    def _build_settings(self) -> None:
        site = self._site
        first = next(iter(site.presets.values()), [""])[0]
        self.kind = gr.Radio(list(_KINDS), value=_NOISE, label="How the weights are shaken")
        self.sigma = gr.Slider(
            0,
            MAX_SIGMA,
            _SIGMA,
            step=0.05,
            label="Strength of the noise, sigma",
            info="Relative to each filter: Flat-LoRA trains with noise of this kind.",
            elem_id="shake-sigma",
        )
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="shake-prompt")
        with gr.Row():
            self.button = gr.Button("Shake", variant="primary", elem_id="shake-draw", min_width=120)
            self.stop_button = stop_button("shake-stop")
        with gr.Row():
            limits: dict[str, Any] = {"minimum": 0, "maximum": MAX_SEED, "step": 1, "min_width": 120}
            self.draw = gr.Number(0, label="Which noise on the weights", elem_id="shake-which", **limits)
            self.seed = gr.Number(0, label="Seed of the picture", elem_id="shake-seed", **limits)
        self._presets = preset_prompts(site.presets, self.prompt)

    def _build_results(self) -> None:
        self.status = gr.HTML(progress("Press Shake, or move the slider."), elem_id="shake-status")
        self.calm: dict[str, gr.Image] = {}
        self.shaken: dict[str, gr.Image] = {}
        self.captions: dict[str, gr.HTML] = {}
        for shown, name, told in ((self.calm, "calm", "{}"), (self.shaken, "shaken", "{}, shaken")):
            with gr.Row(elem_classes="side-by-side"):
                for index, method in enumerate(self._methods):
                    with gr.Column(min_width=90):
                        label = told.format(method)
                        shown[method] = gr.Image(
                            format="png",
                            label=label,
                            interactive=False,
                            buttons=["fullscreen"],
                            elem_id=f"{name}-{index}",
                            elem_classes=self._site.picture_class,
                            alt_text=f"{label}: not drawn yet",
                        )
                        if name == "shaken":
                            self.captions[method] = gr.HTML("", elem_classes="caption")
        self.told = gr.HTML("", elem_id="shake-told")

    def _connect(self) -> None:
        inputs = [self.prompt, self.seed, self.kind, self.sigma, self.draw]
        outputs = [
            self.status,
            self.told,
            *self.calm.values(),
            *self.shaken.values(),
            *self.captions.values(),
        ]
        drawing = gr.on(
            [self.button.click, self.sigma.release, self.kind.input],
            self._shake,
            inputs,
            outputs,
            show_progress="full",
            show_progress_on=self.status,
            js=scrolled_to("shake-results"),
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        connect_stop(self.stop_button, self.status, [drawing])
        self.kind.change(
            lambda kind: gr.Slider(interactive=kind == _NOISE), self.kind, self.sigma, queue=False, **PRIVATE
        )
        for preset in self._presets:
            preset.then(None, js='() => document.getElementById("shake-draw").click()', **PRIVATE)

    # Handlers.

    def _shake(self, prompt: str, seed: float, kind: str, sigma: float, draw: float) -> Iterator[_Update]:
        site, methods = self._site, self._methods
        prompt, seed = check_prompt(prompt), check_seed(seed)
        if kind not in _KINDS:
            raise refusal(f"The weights are shaken in one of these ways: {', '.join(_KINDS)}.")
        bits = _KINDS[kind]
        strength = check_sigma(sigma, MAX_SIGMA) if bits is None else 0.0
        shake = Shake(strength, bits, check_draw(draw))
        warn_of_cut(site.studio, prompt)
        side = site.studio.native_side
        drawing = site.drawing("", site.steps, site.guidance, SAMPLERS[0], side, side)
        what = f"sigma {strength:g}" if bits is None else f"{bits} bits"
        yield {
            self.status: progress("Starting.", 0.0),
            self.told: "",
            **{shown: gr.Image(None) for shown in (*self.calm.values(), *self.shaken.values())},
            **dict.fromkeys(self.captions.values(), ""),
        }
        # Method by method: a calm picture, then a shaken one.
        asked = [(method, change) for method in methods for change in (None, shake)]
        jobs = [Job(method, [(prompt, seed)], drawing, shake=change) for method, change in asked]
        calm: dict[str, Any] = {}
        moved: dict[str, float] = {}
        for event in site.studio.run(jobs):
            method, change = asked[event.job]
            shown = (self.calm if change is None else self.shaken)[method]
            if not isinstance(event, Drawn):
                told = (
                    f"Drawing {method}{', shaken' if change else ''}: about {event.seconds_left:.0f} s left."
                )
                yield {self.status: progress(told, event.fraction), shown: event.sketches[0]}
                continue
            picture = event.pictures[0]
            alt = f'"{prompt}" drawn by {method} with seed {seed}' + (
                f", weights shaken: {what}" if change else ""
            )
            update: _Update = {shown: gr.Image(picture, alt_text=alt)}
            if change is None:
                calm[method] = picture
            else:
                moved[method] = difference(calm[method], picture).mean_percent
                update[self.captions[method]] = f"<p>{what}: changed by {moved[method]:.1f}%</p>"
            yield update
        yield {self.status: progress("Done."), self.told: moved_text(moved, what)}


def moved_text(moved: dict[str, float], what: str) -> str:
    """How far each picture moved, in words that claim no more than one draw shows."""
    ordered = sorted(moved, key=lambda method: moved[method])
    told = ", ".join(f"{html.escape(method)} {moved[method]:.1f}%" for method in ordered)
    spread = max(moved.values()) - min(moved.values())
    verdict = f"<strong>{html.escape(ordered[0])} held best</strong> here"
    if spread < 1:
        verdict = "<strong>The methods hardly differ</strong> here"
    return (
        f"<p>{verdict}. Mean change of the colours at {html.escape(what)}, of the full range: {told}.</p>"
        "<p>One prompt and one draw say little: try others before you conclude anything.</p>"
    )
