"""Small pieces that tabs share."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence

import gradio as gr
from gradio.events import Dependency

from flatlora_diffusion.app.limits import PRIVATE

_LEAST_SHARED = 3  # words, for prompts to be shortened


def progress(told: str, fraction: float | None = None) -> str:
    """A line that screen readers tell when it changes, with a bar where there is something to wait for."""
    bar = ""
    if fraction is not None:
        bar = f'<progress max="1" value="{fraction:.3f}" aria-label="Progress"></progress>'
    return f'<div class="told" role="status" aria-live="polite">{html.escape(told)}{bar}</div>'


def preset_prompts(presets: Mapping[str, Sequence[str]], prompt: gr.Textbox, button: str) -> None:
    """Prompts to click on, under their headings; a click writes one into the field, and draws it.

    Words that all prompts under a heading begin with are told once, in the heading.

    Args:
        presets: Heading -> prompts.
        prompt: The field.
        button: Id of the button that draws.
    """
    if presets:
        gr.HTML("<p>Click one of these to draw it at once:</p>", elem_classes=["caption", "flush"])
    for heading, prompts in presets.items():
        beginning, endings = _common_beginning(prompts)
        dataset = gr.Dataset(
            samples=[[text] for text in prompts],
            sample_labels=endings,
            components=[prompt],
            label=f"{heading}: {beginning} ..." if beginning else heading,
            type="values",
        )
        chosen = dataset.click(lambda values: values[0], dataset, prompt, queue=False, **PRIVATE)
        chosen.then(None, js=f'() => document.getElementById("{button}").click()', **PRIVATE)


def _common_beginning(prompts: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all begin with, and what follows; none where these are few or all that one has."""
    words = [prompt.split() for prompt in prompts]
    shared = [
        own[0] for own in itertools.takewhile(lambda own: len(set(own)) == 1, zip(*words, strict=False))
    ]
    if len(prompts) < 2 or len(shared) < _LEAST_SHARED or any(len(own) == len(shared) for own in words):
        return "", list(prompts)
    return " ".join(shared), [" ".join(own[len(shared) :]) for own in words]


def stop_button(name: str) -> gr.Button:
    """Ends a drawing. It is quieter than what begins one.

    Args:
        name: Its id on the page.
    """
    return gr.Button("Stop", variant="secondary", elem_id=name, elem_classes="stop", scale=0, min_width=100)


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
