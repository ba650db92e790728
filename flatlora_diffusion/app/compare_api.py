"""The comparison for programs: `/compare` without previews, and `/methods`, which says what there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from flatlora_diffusion.app.comparison import Asked
from flatlora_diffusion.app.engine import Drawn
from flatlora_diffusion.app.first import comparison_jobs
from flatlora_diffusion.app.limits import DRAWS
from flatlora_diffusion.app.links import Field
from flatlora_diffusion.draw.stamp import BASE

if TYPE_CHECKING:
    from flatlora_diffusion.app.site import Site


def connect_compare_api(site: Site, settings: Sequence[Field], check: Callable[..., Asked]) -> None:
    """Add both to the current context.

    Args:
        site: Draws.
        settings: The fields, in the order of `comparison.SETTINGS`.
        check: Their values -> what is asked for.
    """
    methods = site.studio.methods

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
            files: list[str] = []
            facts: dict[str, Any] = {}
            for event in site.studio.run(comparison_jobs(methods, asked)):
                if isinstance(event, Drawn):
                    made = (methods[event.job], asked.prompt, asked.seed, asked.drawing, asked.scale)
                    png, sidecar = site.picture_files(folder, event.pictures[0], *made)
                    files.append(str(png))
                    told = json.loads(sidecar.read_text(encoding="utf-8"))
                    facts[made[0]] = {"seconds": event.seconds, **told}
            yield files, facts

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
