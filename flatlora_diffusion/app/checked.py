"""A page whose events take only values of the kinds that their fields have, and say in a line which don't."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction
from gradio.exceptions import Error
from gradio.state_holder import SessionState

from flatlora_diffusion.app.site import refusal

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "string": (str, "text"),
    "number": ((int, float), "a number"),
    "integer": ((int, float), "a number"),
    "boolean": (bool, "true or false"),
    "array": (list, "a list"),
}


class CheckedBlocks(gr.Blocks):
    """`gr.Blocks` that refuses what a program, or a forged request, sends in place of a field's value.

    Components convert what they get, or fail in ways of their own; each such failure is a traceback in the
    log, and tells whoever asked nothing.
    """

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        """The values of an event's fields.

        Raises:
            gradio.Error: A line that names the field; the log has no traceback of it.
        """
        if len(inputs) != len(block_fn.inputs):
            names = ", ".join(_name(block) for block in block_fn.inputs)
            raise refusal(f"{len(inputs)} values were sent for {len(block_fn.inputs)} fields: {names}.")
        for block, value in zip(block_fn.inputs, inputs, strict=True):
            _check(block, value)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except Error as error:  # of a component: out of bounds, or not in the list of choices
            raise refusal(_with_field(str(error.message), block_fn, inputs)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise refusal("The values that were sent are not those of this event's fields.") from error


def _check(block: Any, value: Any) -> None:
    if getattr(block, "stateful", False) or not isinstance(block, gr.components.Component):
        return
    described = block.api_info()
    kind = described.get("type") if isinstance(described, dict) else None
    if kind not in _KINDS:
        return
    types, told = _KINDS[kind]
    # An emptied number box sends nothing: what it is for says so better, where it is used.
    if value is None and isinstance(block, gr.Number):
        return
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "boolean"):
        raise refusal(f"{_name(block)} must be {told}.")


def _with_field(message: str, block_fn: BlockFunction, inputs: list[Any]) -> str:
    """The message with the name of the field that it is about, where that is sure."""
    for block, value in zip(block_fn.inputs, inputs, strict=True):
        if isinstance(block, (gr.Slider, gr.Number)) and isinstance(value, (int, float)):
            low, high = block.minimum, block.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                return f"{_name(block)}: {message}"
    return message


def _name(block: Any) -> str:
    return str(getattr(block, "label", None) or "A value")
