"""Prompts to choose from: what an adapter should do, and what it should leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.app.references import References


def presets(adapters: Mapping[str, AdapterFacts], references: References) -> dict[str, Sequence[str]]:
    """Heading -> prompts: those of the runs that the adapters are of, and what their files say.

    Args:
        adapters: Label -> what its file says.
        references: What the runs taught.
    """
    groups = references.presets()
    named = [facts.facts.get("instance_prompt") for facts in adapters.values()]
    known = [prompt for prompts in groups.values() for prompt in prompts]
    own = [p for p in dict.fromkeys(named) if isinstance(p, str) and p and p not in known]
    if own and not references.trained:
        groups["Prompts of training"] = own
    return groups
