"""Packages that only some flags need."""

from __future__ import annotations

from types import ModuleType

from flatlora_diffusion.common.errors import UserError


def import_extra(package: str, flag: str) -> ModuleType:
    """Import a package that the project's own requirements don't install.

    Args:
        package: Its name.
        flag: What the user gave that needs it: a flag, or a command.

    Raises:
        UserError: It is not installed.
    """
    try:
        return __import__(package)
    except ImportError as error:
        otherwise = ", or leave the flag out" if flag.startswith("-") else ""
        raise UserError(f"{flag} needs the package {package}: pip install {package}{otherwise}") from error
