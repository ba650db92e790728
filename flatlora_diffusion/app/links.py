"""Links that reproduce a comparison: the query of the page's address, read and shown."""

from __future__ import annotations

from typing import Any

import gradio as gr

from flatlora_diffusion.app.limits import MAX_PROMPT

# The address of the page becomes the link to what it shows.
SHOW_LINK = """(query) => {
    history.replaceState(null, "", location.pathname + query);
    return location.origin + location.pathname + query;
}"""

COMPARE_IF_LINKED = """() => {
    if (new URLSearchParams(location.search).has("prompt")) {
        document.getElementById("compare").click();
    }
}"""


Field = gr.Textbox | gr.Dropdown | gr.Slider | gr.Number


def from_link(text: str | None, component: Field, name: str) -> Any:
    """A component's value from a link, or its own where the link names none or a bad one."""
    if text is None:
        return gr.skip()
    if isinstance(component, gr.Dropdown):
        good = text in [value for _, value in component.choices]
        value: Any = text
    elif isinstance(component, gr.Textbox):
        good, value = len(text) <= MAX_PROMPT, text
    else:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        good = component.minimum <= value <= component.maximum
        if good and (isinstance(component, gr.Number) or component.step in (1, 8)):
            value = int(value)
    if good:
        return value
    gr.Warning(f"The link's {name.replace('_', ' ')} is not one that this page has; it was left out.")
    return gr.skip()
