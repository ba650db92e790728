"""What an adapter file is, and what several at once are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.mix import Mix, Source, mix_digest


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter file is.

    Attributes:
        file: The file itself, also where its folder was given.
        sha256: Of the file, in hex.
        method: `LoRA` or `Flat-LoRA`; None for other people's files, which don't say.
        rank: Of its layers: `4`, or from the lowest to the highest: `4-8`.
        alpha: In the same way; None where the file states none, and the update is B @ A.
        layers: Number of adapted layers.
        parameters: Number of values in all.
        parts: Those of `unet`, `text_encoder` and `text_encoder_2` that have adapted layers.
        dora: Whether any layer has DoRA's magnitudes.
        facts: What this project wrote into it (`file.read_facts`).
        mix: Of several adapters at once: what each is, and its scale. Rank, alpha and layers are of all.
    """

    file: Path
    sha256: str
    method: str | None
    rank: str
    alpha: str | None
    layers: int
    parameters: int
    parts: tuple[str, ...]
    dora: bool
    facts: dict[str, Any]
    mix: tuple[tuple[AdapterFacts, float], ...] = ()

    @property
    def source(self) -> Source:
        """What it was loaded from."""
        return Mix(tuple((part.file, scale) for part, scale in self.mix)) if self.mix else self.file

    @property
    def mixed(self) -> list[list[str | float]] | None:
        """Of several at once the SHA-256 and the scale of each, as stamps have them."""
        return [[part.sha256, scale] for part, scale in self.mix] or None


def facts_of_mix(parts: Sequence[tuple[AdapterFacts, float]]) -> AdapterFacts:
    """What several adapters at once are.

    Args:
        parts: Each with its scale.
    """
    all_facts = [facts for facts, _ in parts]
    told = [facts.alpha for facts in all_facts]
    return AdapterFacts(
        file=all_facts[0].file,
        sha256=mix_digest((facts.sha256, scale) for facts, scale in parts),
        method=None,
        rank=" + ".join(facts.rank for facts in all_facts),
        alpha=None if None in told else " + ".join(filter(None, told)),
        layers=sum(facts.layers for facts in all_facts),
        parameters=sum(facts.parameters for facts in all_facts),
        parts=tuple(dict.fromkeys(part for facts in all_facts for part in facts.parts)),
        dora=any(facts.dora for facts in all_facts),
        facts={},
        mix=tuple(parts),
    )
