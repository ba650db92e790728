"""The words of --lora_layers: names of layers, and ranks of their own."""

from __future__ import annotations

from collections.abc import Iterable

from flatlora_diffusion.common.errors import UserError

_FLAG = "--lora_layers"


def split_layers(words: Iterable[str]) -> tuple[str, ...]:
    """The words one by one where they have commas between them, as scripts of diffusers take them."""
    return tuple(part.strip() for word in words for part in word.split(","))


def parse_layers(words: Iterable[str]) -> list[tuple[str, int | None]]:
    """Names or patterns, each with its rank, or None where it has that of --rank.

    Raises:
        UserError: A word is no NAME or NAME=RANK.
    """
    return [_parse(word) for word in words]


def _parse(word: str) -> tuple[str, int | None]:
    name, separator, rank = word.partition("=")
    if not name or (separator and not (rank.isascii() and rank.isdigit())):
        raise UserError(f'{_FLAG} "{word}": must be NAME or NAME=RANK, such as to_q or "down_blocks.2.*=8"')
    if not separator:
        return name, None
    if not int(rank):
        raise UserError(f"{_FLAG} {word}: a rank must be 1 or more; name only layers that get a LoRA")
    return name, int(rank)
