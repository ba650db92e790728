"""Prompts to choose from: what an adapter should do, and what it should leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flatlora_diffusion.adapter.check import AdapterFacts
from flatlora_diffusion.output.reading import RunFolder

DEMO = {
    "Subjects that were never trained": [
        "a fluent 3d icon of tomato",
        "a fluent 3d icon of soccer ball",
        "a fluent 3d icon of cat face",
        "a fluent 3d icon of red heart",
    ],
    "Trained icons": [
        "a fluent 3d icon of red apple",
        "a fluent 3d icon of grinning face",
        "a fluent 3d icon of fox",
    ],
    "The base's own styles: is anything forgotten?": [
        "a noto icon of red heart",
        "a twemoji icon of grinning face",
        "a noto icon of tomato",
    ],
}


def presets(adapters: Mapping[str, AdapterFacts], runs: Mapping[str, RunFolder]) -> dict[str, Sequence[str]]:
    """Prompts that a visitor of any other base can start from: those that the adapters were trained with.

    Args:
        adapters: Label -> what its file says.
        runs: Label -> training run.
    """
    trained = [facts.facts.get("instance_prompt") for facts in adapters.values()]
    drawn = [prompt for run in runs.values() for prompt in run.read().settings.get("validation_prompt") or ()]
    groups = {"Prompts of validation": drawn, "Prompts of training": trained}
    return {
        heading: list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
        for heading, prompts in groups.items()
        if any(prompts)
    }
