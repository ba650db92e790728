"""Small pieces that tabs share."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import gradio as gr
from gradio.events import Dependency

from flatlora_diffusion.app.site import MAX_GUIDANCE, MAX_PROMPT, MAX_STEPS, PRIVATE, Site
from flatlora_diffusion.draw.samplers import SAMPLERS


def progress(told: str, fraction: float | None = None) -> str:
    """A line that screen readers tell when it changes, with a bar where there is something to wait for."""
    bar = ""
    if fraction is not None:
        bar = f'<progress max="1" value="{fraction:.3f}" aria-label="Progress"></progress>'
    return f'<div class="told" role="status" aria-live="polite">{html.escape(told)}{bar}</div>'


def preset_prompts(presets: Mapping[str, Sequence[str]], prompt: gr.Textbox) -> None:
    """Prompts to click on, under their headings; a click writes one into the field."""
    for heading, prompts in presets.items():
        dataset = gr.Dataset(
            samples=[[text] for text in prompts], components=[prompt], label=heading, type="values"
        )
        dataset.click(lambda values: values[0], dataset, prompt, queue=False, **PRIVATE)


def connect_stop(button: gr.Button, status: gr.HTML, drawing: Sequence[Dependency]) -> None:
    """Let a button end what these events draw, and say so."""
    stopped = button.click(None, cancels=list(drawing), queue=False, **PRIVATE)
    # Afterwards: what was still told of the drawing must not be the last word.
    stopped.then(lambda: progress("Stopped."), None, status, queue=False, show_progress="hidden", **PRIVATE)


def scrolled_to(element: str) -> str:
    """JavaScript for an event: its results come into sight, which on a phone are below the settings."""
    return f"""(...given) => {{
        const show = () => document.getElementById("{element}").scrollIntoView({{block: "nearest"}});
        setTimeout(show, 200);
        return given;
    }}"""


def drawing_fields(site: Site) -> list[gr.components.Component]:
    """Fields in the current context for what `Site.drawing` takes, in its order."""
    sides = {"minimum": site.smallest_side, "maximum": site.largest_side, "step": 8}
    return [
        gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT),
        gr.Slider(1, MAX_STEPS, site.steps, step=1, label="Denoising steps"),
        gr.Slider(0, MAX_GUIDANCE, site.guidance, step=0.1, label="Guidance"),
        gr.Dropdown(list(SAMPLERS), value=SAMPLERS[0], label="Sampler"),
        gr.Slider(value=site.studio.native_side, label="Width", **sides),
        gr.Slider(value=site.studio.native_side, label="Height", **sides),
    ]
