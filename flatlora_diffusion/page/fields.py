"""Fields that several tabs have."""

from __future__ import annotations

import gradio as gr

from flatlora_diffusion.page.site import MAX_GUIDANCE, MAX_PROMPT, MAX_STEPS, Site
from flatlora_diffusion.samplers import SAMPLERS


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
