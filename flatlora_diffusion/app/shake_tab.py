"""The tab that shakes the merged weights of each method alike, and shows whose pictures hold."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd

from flatlora_diffusion.app.colours import method_colours
from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.limits import DRAWS, MAX_SCALE, MAX_SEED, PRIVATE
from flatlora_diffusion.app.site import (
    Site,
    check_draw,
    check_prompt,
    check_scale,
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
_ADDED = "Another adapter added"
_BITS = {"Rounded to 8 bits": 8, "Rounded to 4 bits": 4, "Rounded to 3 bits": 3}
_KINDS = (_NOISE, *_BITS, _ADDED)
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
            info="0.1 shakes the weights by a tenth of their size. Flat-LoRA trains with noise of this kind.",
            elem_id="shake-sigma",
        )
        with gr.Row(visible=False) as self._addition:
            labels = list(site.studio.adapters)
            self.other = gr.Dropdown(labels, value=labels[0], label="The other adapter", min_width=120)
            self.times = gr.Slider(
                0, MAX_SCALE, 0.5, step=0.05, label="How much of it", elem_id="shake-times", min_width=160
            )
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="shake-prompt")
        with gr.Row():
            self.button = gr.Button("Shake", variant="primary", elem_id="shake-draw", min_width=120)
            self.stop_button = stop_button("shake-stop")
        with gr.Row():
            limits: dict[str, Any] = {"minimum": 0, "maximum": MAX_SEED, "step": 1, "min_width": 120}
            self.draw = gr.Number(0, label="Which noise on the weights", elem_id="shake-which", **limits)
            self.seed = gr.Number(0, label="Seed of the picture", elem_id="shake-seed", **limits)
        preset_prompts(site.presets, self.prompt, "shake-draw")

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
        if rises := self._site.measured.rises:
            points = [(sigma, rise, method) for method, own in rises.items() for sigma, rise in own]
            gr.LinePlot(
                pd.DataFrame(points, columns=["sigma", "rise", "method"]),
                x="sigma",
                y="rise",
                color="method",
                color_map=method_colours(list(rises)),
                x_title="Strength of the noise, sigma",
                y_title="Rise of the loss, in percent",
                color_title="Method",
                label="Measured over many pictures: how much noise raises the loss",
                height=260,
                buttons=["fullscreen"],
                elem_id="shake-rise",
            )

    def _connect(self) -> None:
        inputs = [self.prompt, self.seed, self.kind, self.sigma, self.draw, self.other, self.times]
        outputs = [
            self.status,
            self.told,
            *self.calm.values(),
            *self.shaken.values(),
            *self.captions.values(),
        ]
        drawing = gr.on(
            [
                self.button.click,
                self.sigma.release,
                self.kind.input,
                self.other.input,
                self.times.release,
            ],
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
            lambda kind: [gr.Slider(visible=kind == _NOISE), gr.Row(visible=kind == _ADDED)],
            self.kind,
            [self.sigma, self._addition],
            queue=False,
            show_progress="hidden",
            **PRIVATE,
        )

    # Handlers.

    def _shake(
        self, prompt: str, seed: float, kind: str, sigma: float, draw: float, other: str, times: float
    ) -> Iterator[_Update]:
        site, methods = self._site, self._methods
        prompt, seed = check_prompt(prompt), check_seed(seed)
        change, what = self._change(kind, sigma, draw, other, times)
        warn_of_cut(site.studio, prompt)
        side = site.studio.native_side
        drawing = site.drawing("", site.steps, site.guidance, SAMPLERS[0], side, side)
        yield {
            self.status: progress("Starting.", 0.0),
            self.told: "",
            **{shown: gr.Image(None) for shown in (*self.calm.values(), *self.shaken.values())},
            **dict.fromkeys(self.captions.values(), ""),
        }
        # Method by method: a calm picture, then a shaken one.
        asked = [(method, is_shaken) for method in methods for is_shaken in (False, True)]
        jobs = [Job(method, [(prompt, seed)], drawing, **(change if own else {})) for method, own in asked]
        calm: dict[str, Any] = {}
        moved: dict[str, float] = {}
        for event in site.studio.run(jobs):
            method, is_shaken = asked[event.job]
            shown = (self.shaken if is_shaken else self.calm)[method]
            if not isinstance(event, Drawn):
                after = ", shaken" if is_shaken else ""
                told = f"Drawing {method}{after}: about {event.seconds_left:.0f} s left."
                yield {self.status: progress(told, event.fraction), shown: event.sketches[0]}
                continue
            picture = event.pictures[0]
            alt = f'"{prompt}" drawn by {method} with seed {seed}' + (
                f", weights shaken: {what}" if is_shaken else ""
            )
            update: _Update = {shown: gr.Image(picture, alt_text=alt)}
            if is_shaken:
                moved[method] = difference(calm[method], picture).mean_percent
                told = f"{what}: changed by {moved[method]:.1f}%"
                update[self.captions[method]] = f"<p>{html.escape(told)}</p>"
            else:
                calm[method] = picture
            yield update
        yield {self.status: progress("Done."), self.told: moved_text(moved, what)}

    def _change(
        self, kind: str, sigma: float, draw: float, other: str, times: float
    ) -> tuple[dict[str, Any], str]:
        """What a job gets for it, and what it is called."""
        if kind not in _KINDS:
            raise refusal(f"The weights are shaken in one of these ways: {', '.join(_KINDS)}.")
        if kind == _ADDED:
            times = check_scale(times)
            return {"added": (other, times)}, f"{other} x {times:g} added"
        if kind == _NOISE:
            strength = check_sigma(sigma, MAX_SIGMA)
            return {"shake": Shake(strength, draw=check_draw(draw))}, f"sigma {strength:g}"
        return {"shake": Shake(bits=_BITS[kind])}, f"{_BITS[kind]} bits"


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
