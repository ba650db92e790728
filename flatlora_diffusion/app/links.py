"""Links that reproduce a comparison: the query of the page's address, read."""

from __future__ import annotations

from typing import Any

import gradio as gr

from flatlora_diffusion.app.limits import MAX_PROMPT

# Where the page doesn't show it already, and nothing was left out of it. Gives the link to what is shown.
COMPARE_IF_LINKED = """(link) => {
    const wanted = new URLSearchParams(location.search);
    const shown = new URLSearchParams((link ?? "").split("?")[1] ?? "");
    const other = [...shown].some(([name, value]) => wanted.has(name) && wanted.get(name) !== value);
    const bad = document.getElementById("status").innerText.includes("Left out");
    if (!wanted.has("prompt") || (link && !other)) return window.flatlora.showLink(link);
    if (!bad) document.getElementById("compare").click();
    return link;
}"""


Field = gr.Textbox | gr.Dropdown | gr.Slider | gr.Number


def from_link(text: str | None, component: Field, name: str, left_out: list[str]) -> Any:
    """A component's value from a link, or its own where the link names none or a bad one.

    Args:
        text: What the link says.
        component: The field.
        name: What the link calls it.
        left_out: Names of bad ones are added.
    """
    if text is None:
        return gr.skip()
    if isinstance(component, gr.Dropdown):
        good = text in [value for _, value in component.choices]
        value: Any = text
    elif isinstance(component, gr.Textbox):
        good, value = bool(text.strip() or name != "prompt") and len(text) <= MAX_PROMPT, text
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
    left_out.append(name.replace("_", " "))
    return gr.skip()
