"""Which of a pipeline's adapters are active: one, several under a name, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from diffusers import StableDiffusionXLPipeline

from flatlora_diffusion.adapter.new_tokens import loaded_words, remember_words

_MIXES = "mixed_adapters"  # attribute of a pipeline: name -> adapter -> scale


def activate(pipeline: StableDiffusionXLPipeline, adapter: str | None, scale: float = 1.0) -> None:
    """Make one of the loaded adapters the active one, at a scale, or none."""
    if adapter is not None:
        pipeline.enable_lora()
        parts = parts_of(pipeline, adapter)
        pipeline.set_adapters(list(parts), [scale * own for own in parts.values()])
    elif pipeline.get_list_adapters():
        pipeline.disable_lora()


def remember_mix(pipeline: StableDiffusionXLPipeline, name: str, scales: Mapping[str, float]) -> None:
    """Have a name stand for several loaded adapters, each at a scale of its own."""
    vars(pipeline).setdefault(_MIXES, {})[name] = dict(scales)


def parts_of(pipeline: StableDiffusionXLPipeline, name: str) -> dict[str, float]:
    """The adapters that are active under a name, with their scales: several for a mix, else itself."""
    return vars(pipeline).get(_MIXES, {}).get(name, {name: 1.0})


@contextlib.contextmanager
def blended(
    pipeline: StableDiffusionXLPipeline, adapter: str | None, scales: Mapping[str, float]
) -> Iterator[str]:
    """Within the block a name stands for several loaded adapters at once, as that of a mix does.

    Args:
        pipeline: With its adapters.
        adapter: The one whose new tokens count in prompts; None for none.
        scales: Those that are active, as `parts_of` names them, and the scale of each.

    Yields:
        The name, for `draw_batch` and the like.
    """
    name = "blend"
    remember_mix(pipeline, name, scales)
    remember_words(pipeline, name, loaded_words(pipeline, adapter))
    try:
        yield name
    finally:
        del vars(pipeline)[_MIXES][name]
        remember_words(pipeline, name, {})
