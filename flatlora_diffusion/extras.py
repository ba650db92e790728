"""Packages that only some flags need."""

from __future__ import annotations

from types import ModuleType

from flatlora_diffusion.errors import UserError


def import_extra(package: str, flag: str, extra: str) -> ModuleType:
    """Import a package that the extra `flatlora_diffusion[extra]` installs.

    Args:
        package: Its name.
        flag: What the user gave that needs it.
        extra: The extra of this project that has it.

    Raises:
        UserError: It is not installed.
    """
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"{flag} needs the package {package}: pip install 'flatlora_diffusion[{extra}]', "
            "or leave the flag out"
        ) from error
