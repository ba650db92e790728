"""Model cards that are there already, and the scale that an evaluation has noted in their adapters."""

from __future__ import annotations

import re
from pathlib import Path

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.adapter.strength import STRENGTH_OF
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.output.card import CARD, USE, is_ours, sealed, unsealed
from flatlora_diffusion.output.findings import scales
from flatlora_diffusion.output.names import ARMS


def note_in_cards(adapter: Path) -> list[Path]:
    """Say in the model cards of an adapter, and of its comparison, which scale is noted in its file.

    Cards that somebody has written or changed stay as they are.

    Args:
        adapter: Its file.

    Returns:
        The cards that say so.

    Raises:
        UserError: The disk is full or not writable.
    """
    method = read_facts(adapter).get("method")
    if method is None or adapter.name != WEIGHTS_NAME:  # the cards are of others
        return []
    shown = {adapter.parent: {method: adapter.parent}}
    if adapter.parent.name in ARMS.values():
        comparison = adapter.parent.parent
        arms = {method: comparison / name for method, name in ARMS.items()}
        shown[comparison] = {m: arm for m, arm in arms.items() if (arm / WEIGHTS_NAME).is_file()}
    cards = []
    for folder, adapters in shown.items():
        card = folder / CARD
        if card.is_file() and is_ours(content := card.read_bytes()):
            before, heading, after = unsealed(content).decode().partition(f"{USE}\n")
            if heading:
                after = re.sub(rf"{STRENGTH_OF.format('.*')}.*\n\n", "", after)
                told = "".join(f"{line}\n" for line in scales(adapters))
                write_atomically(card, sealed(f"{before}{heading}{told}{after}".encode()))
                cards.append(card)
    return cards
