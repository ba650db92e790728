"""Two pictures over each other under one divider, as HTML; `page.js` fills it and moves the divider."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

import gradio as gr

_CORNERS = (
    '<svg viewBox="0 0 16 16" width="18" height="18" fill="none" stroke="#fff" stroke-width="2" '
    'aria-hidden="true"><path d="M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4"/></svg>'
)


def stage(methods: Sequence[str], left: str, right: str, picture: str, small: bool) -> gr.HTML:
    """The stage in the current context.

    The pictures are those of `gr.Image`s on the page, and change with them. The divider is a range input
    that lies over the pictures: it is dragged, tapped, and moved by the arrow keys.

    Args:
        methods: Whose picture is which.
        left: The method that is on the left first.
        right: That on the right.
        picture: Their elements' ids are this and the method's index.
        small: Pictures are enlarged without smoothing.
    """
    sides = "".join(
        f'<img class="{side}" alt=""><span class="stage-label {side}"></span>' for side in ("left", "right")
    )
    data = {"methods": json.dumps(list(methods)), "left": left, "right": right, "picture": picture}
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    return gr.HTML(
        f'<figure class="stage empty{" crisp" if small else ""}" {attributes}>'
        f'<div class="stage-frame"><div class="stage-box">{sides}<div class="stage-line"></div>'
        '<input type="range" min="0" max="100" step="1" value="50" '
        'aria-label="Divider between left and right, in percent">'
        '<button type="button" class="stage-full" aria-label="Full screen" title="Full screen">'
        f"{_CORNERS}</button>"
        '<p class="stage-note" role="status" aria-live="polite"></p></div></div>'
        '<figcaption><span class="stage-prompt"></span><span class="stage-hint">. '
        '<span class="for-large">Two pictures, one over the other.</span> Drag the line'
        '<span class="for-keys">, or use the arrow keys</span>.</span></figcaption></figure>',
        elem_id="slider",
        js_on_load=None,
    )
