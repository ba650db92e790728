"""The packages that take part in a result, and their versions."""

from __future__ import annotations

from functools import cache
from importlib import metadata

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
"""Those that decide whatever is computed here."""


def package_versions(*names: str) -> dict[str, str]:
    """The versions of installed packages, by name, in the order given."""
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str:
    # Reading it takes milliseconds, and every picture that is saved asks for several.
    return metadata.version(name)
