"""The scale to draw an adapter with, as an evaluation has found it: a note in the adapter's file.

The note is a metadata entry of its own. What identifies the adapter elsewhere (pictures, manifests, votes,
runs that start from it) is the hash of the file without it: see `file_digest`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flatlora_diffusion.adapter.file import FLAT_METADATA_KEY, metadata_of, with_metadata
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically

STRENGTH_KEY = "flat_lora_strength"
STRENGTH_OF = "Recommended scale of {}:"
"""How the sentence of a method begins."""


@dataclass(frozen=True)
class Strength:
    """A recommended scale, and how much better it is than 1: losses there, relative to those at 1.

    Attributes:
        scale: 1 where no other one is better beyond its noise.
        heldout: Change of the loss on held-out pictures of the style; -0.01 is 1% lower.
        heldout_error: Its standard error over the pictures.
        retention: The same on the base's own styles; None where that wasn't measured.
        retention_error: Its standard error.
        pictures: Number of held-out pictures.
    """

    scale: float
    heldout: float
    heldout_error: float
    retention: float | None
    retention_error: float | None
    pictures: int

    def sentence(self, name: str) -> str:
        """The recommendation in words.

        Args:
            name: What the adapter is called.
        """
        if self.scale == 1:
            shown = f"{self.pictures} held-out picture{'s' * (self.pictures > 1)}"
            start = f"{STRENGTH_OF.format(name)} 1.0 is as good as any; none lowers the loss on {shown}"
            if self.retention is None:
                return f"{start} beyond its noise."
            return f"{start}, or that on the base's own styles, beyond its noise without raising the other."
        told = f"the loss on held-out pictures is {_change(self.heldout, self.heldout_error)}"
        if self.retention is not None and self.retention_error is not None:
            told += f", that on the base's own styles {_change(self.retention, self.retention_error)}"
        return f"{STRENGTH_OF.format(name)} {self.scale:g}; {told} than at 1.0."


def _change(value: float, error: float) -> str:
    way = "lower" if value < 0 else "higher"
    return f"{100 * abs(value):.2f}% (± {100 * error:.2f}) {way}" if value else "no other"


def read_strength(file: Path) -> Strength | None:
    """The recommendation in an adapter's file; None where there is none, or it isn't what was written.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(STRENGTH_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a sound safetensors file ({error})") from error
    return None if text is None else _parsed(text)


def _parsed(text: str) -> Strength | None:
    try:
        content = json.loads(text)
        numbers = {field.name: content[field.name] for field in dataclasses.fields(Strength)}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    optional = ("retention", "retention_error")
    sound = all(
        isinstance(value, (int, float)) or (value is None and name in optional)
        for name, value in numbers.items()
    )
    return Strength(**numbers) if sound else None


def write_strength(file: Path, strength: Strength) -> bool:
    """Note a recommendation in the file of an adapter of this trainer; its tensors keep their bits.

    Returns:
        Whether it was noted: other programs' files are left alone, since they couldn't be told by their
        hashes any more.

    Raises:
        UserError: The file cannot be read or written. It is the old one or the new one, never half of it.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    plain = without_strength(content)
    if FLAT_METADATA_KEY not in metadata_of(plain) or with_metadata(plain, {}) != plain:
        return False
    noted = with_metadata(plain, {STRENGTH_KEY: json.dumps(dataclasses.asdict(strength), sort_keys=True)})
    if noted != content:
        write_atomically(file, noted)
    return True


def without_strength(content: bytes) -> bytes:
    """An adapter's file as it was before a recommendation was noted in it."""
    return with_metadata(content, {STRENGTH_KEY: None}) if STRENGTH_KEY in metadata_of(content) else content


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hex; without the scale that an evaluation may have noted in it since."""
    return hashlib.sha256(without_strength(file.read_bytes())).hexdigest()
