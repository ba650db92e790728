"""Everything random is a function of named numbers: hashes and private generators."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator

import torch


def keyed_generator(*key: object) -> torch.Generator:
    """A private generator on the CPU whose numbers depend on the key alone."""
    return torch.Generator().manual_seed(hash64(*key))


@contextlib.contextmanager
def seeded(device: torch.device, key: int) -> Generator[None]:
    """The global RNG of the CPU and a device, seeded with a key inside the block; afterwards as it was."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None  # torch forgets it
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(key)  # pyright: ignore[reportUnknownMemberType]
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)


def hash64(*parts: object) -> int:
    """A 64-bit key that is the same in every process and version of Python, unlike `hash`."""
    # Names of files may hold bytes that are no text.
    text = "\x1f".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
