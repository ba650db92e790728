"""What is evaluated, and how. It imports nothing slow: the command line lists the parts before that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatlora_diffusion.adapter.mix import Source
    from flatlora_diffusion.data.images import Sample

PARTS = ("losses", "drawn", "flatness", "tradeoff", "sharpness")


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how.

    Attributes:
        base: Folder or hub name of the base.
        adapters: Label -> file, folder of a run, or several at once.
        heldout: Pictures of the taught style whose subjects were never trained, with their captions.
        training: Those that were; empty where they aren't at hand.
        retention: Pictures of the base's own styles, with their captions; or empty.
        prompts: In their place: what the base draws for these prompts stands for its own styles.
        clip: Folder or hub name of a CLIP, or None: no picture is drawn for CLIP-I, CLIP-T and drift.
        resolution: Of pictures and losses; None is the base's own.
        steps: Denoising steps of drawn pictures.
        guidance: Of drawn pictures.
        caption_chunks: Pieces in which captions and prompts are read, see `sdxl.encoding.encode_prompts`.
        parts: Those of `PARTS` that are measured.
        device: Where.
        dtype: Name of the precision.
    """

    base: str
    adapters: Mapping[str, Source]
    heldout: Sequence[Sample]
    training: Sequence[Sample] = ()
    retention: Sequence[Sample] = ()
    prompts: Sequence[str] = ()
    clip: str | None = None
    resolution: int | None = None
    steps: int = 30
    guidance: float = 5.0
    caption_chunks: int = 1
    parts: Sequence[str] = PARTS
    device: str = "cpu"
    dtype: str = "fp32"
