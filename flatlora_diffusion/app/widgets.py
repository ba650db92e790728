"""Small pieces that tabs share."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import gradio as gr
from gradio.events import Dependency

from flatlora_diffusion.app.limits import PRIVATE


def progress(told: str, fraction: float | None = None) -> str:
    """A line that screen readers tell when it changes, with a bar where there is something to wait for."""
    bar = ""
    if fraction is not None:
        bar = f'<progress max="1" value="{fraction:.3f}" aria-label="Progress"></progress>'
    return f'<div class="told" role="status" aria-live="polite">{html.escape(told)}{bar}</div>'


def preset_prompts(presets: Mapping[str, Sequence[str]], prompt: gr.Textbox) -> list[Dependency]:
    """Prompts to click on, under their headings; a click writes one into the field.

    Returns:
        The events that follow the clicks.
    """
    clicks = []
    for heading, prompts in presets.items():
        dataset = gr.Dataset(
            samples=[[text] for text in prompts], components=[prompt], label=heading, type="values"
        )
        clicks.append(dataset.click(lambda values: values[0], dataset, prompt, queue=False, **PRIVATE))
    return clicks


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
