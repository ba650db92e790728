"""The comparison for programs: `/compare` without previews, and `/methods`, which says what there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from flatlora_diffusion.app.comparison import Asked, Comparison
from flatlora_diffusion.app.limits import DRAWS
from flatlora_diffusion.app.links import Field
from flatlora_diffusion.draw.stamp import BASE

if TYPE_CHECKING:
    from flatlora_diffusion.app.site import Site


def connect_compare_api(
    site: Site,
    settings: Sequence[Field],
    check: Callable[..., Asked],
    draw: Callable[[Asked, Path], Comparison],
) -> None:
    """Add both to the current context.

    Args:
        site: Draws.
        settings: The fields, in the order of `comparison.SETTINGS`.
        check: Their values -> what is asked for.
        draw: Draws it into a folder.
    """

    def compare(
        prompt: str,
        negative_prompt: str,
        seed: float,
        steps: int,
        guidance: float,
        scale: float,
        sampler: str,
        width: int,
        height: int,
    ) -> Iterator[tuple[list[str], dict[str, Any]]]:
        asked = check(prompt, negative_prompt, seed, steps, guidance, scale, sampler, width, height)
        with site.lent_folder() as folder:
            comparison = draw(asked, folder)
            facts: dict[str, Any] = {}
            for method, file in comparison.files.items():
                told = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                facts[method] = {"seconds": comparison.seconds[method], **told}
            yield [str(file) for file in comparison.files.values()], facts

    def describe() -> dict[str, Any]:
        described: dict[str, Any] = {BASE: {"name": site.studio.base}}
        for label, adapter in site.studio.adapters.items():
            described[label] = {
                "method": adapter.method,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "sha256": adapter.sha256,
                "layers": adapter.layers,
                "parameters": adapter.parameters,
            }
        return described

    pictures = gr.Files(visible=False)
    facts = gr.JSON(visible=False)
    gr.Button(visible=False).click(
        compare,
        list(settings),
        [pictures, facts],
        api_name="compare",
        api_description="Draw a prompt and seed with the base and every adapter: PNGs and their JSON.",
        **DRAWS,
    )
    gr.Button(visible=False).click(
        describe,
        None,
        facts,
        queue=False,
        api_name="methods",
        api_description="What the methods are: rank, alpha, hash of each adapter.",
    )
