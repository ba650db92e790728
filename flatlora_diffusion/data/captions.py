"""What the model is told of an image at each step: its caption, its tags in another order, or nothing.

Names and meaning of the settings are those of kohya's scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flatlora_diffusion.common.seeds import keyed_generator

SEPARATOR = ","
MOST_ORDERS = 8  # of a caption's tags: the embeddings of each are kept where the text encoders aren't trained

_ATTEMPTS = 64


def tag_orders(caption: str, keep_tokens: int, seed: int) -> list[str]:
    """The caption with its comma-separated tags in up to 8 different orders.

    They are a function of (seed, caption). Tags are joined by a comma and a space; empty ones are left out.

    Args:
        caption: Of an image.
        keep_tokens: So many tags at the start stay where they are.
        seed: Decides the orders.
    """
    tags = [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]
    kept, loose = tags[:keep_tokens], tags[keep_tokens:]
    draw = keyed_generator(seed, "tag orders", caption)
    orders: dict[str, None] = {}
    for _ in range(_ATTEMPTS):  # few tags have fewer orders than there may be
        shuffled = [loose[index] for index in torch.randperm(len(loose), generator=draw)]
        orders[f"{SEPARATOR} ".join(kept + shuffled)] = None
        if len(orders) == MOST_ORDERS:
            break
    return list(orders)


@dataclass(frozen=True)
class Captioning:
    """How captions are told.

    Attributes:
        dropout_rate: How often the empty prompt is told in their place, in [0, 1].
        shuffle: Whether their comma-separated tags come in other orders.
        keep_tokens: So many tags at the start stay where they are.
    """

    dropout_rate: float = 0.0
    shuffle: bool = False
    keep_tokens: int = 0


AS_THEY_ARE = Captioning()


class CaptionStream:
    """Captions at the positions of the stream of samples, each a function of (seed, position).

    Args:
        captions: Of the images.
        captioning: How they are told.
        seed: Decides orders and draws.

    Attributes:
        whole: The captions as they are.
    """

    def __init__(self, captions: Sequence[str], captioning: Captioning, seed: int) -> None:
        self.whole = list(captions)
        self._orders = [
            tag_orders(caption, captioning.keep_tokens, seed) if captioning.shuffle else [caption]
            for caption in captions
        ]
        self._dropout_rate = captioning.dropout_rate
        self._seed = seed

    @property
    def prompts(self) -> list[str]:
        """All that may be told."""
        empty = [""] if self._dropout_rate else []
        return empty + [caption for orders in self._orders for caption in orders]

    def at(self, position: int, index: int) -> str:
        """What is told of image `index` where it stands at a position."""
        draws = keyed_generator(self._seed, "caption", position)
        dropped = torch.rand((), generator=draws) < self._dropout_rate
        order = int(torch.randint(len(self._orders[index]), (), generator=draws))
        return "" if dropped else self._orders[index][order]
