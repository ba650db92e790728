"""The packages that take part in a result, and their versions."""

from __future__ import annotations

from importlib.metadata import version

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
"""Those that decide whatever is computed here."""


def package_versions(*names: str) -> dict[str, str]:
    """The versions of installed packages, by name, in the order given."""
    return {name: version(name) for name in names}
