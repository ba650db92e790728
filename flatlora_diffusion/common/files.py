"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

from flatlora_diffusion.common.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that whatever happens it is either the old one or the new one, complete and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror}){advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut; Windows has no such call, and keeps a journal."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_cache_folder(variable: str, name: str) -> Path | None:
    """A folder for what can be made again.

    Args:
        variable: Of the environment; it names the folder where it is set.
        name: What the folder is called where the system has such folders.

    Returns:
        None where the user has no home, as in some containers.
    """
    if chosen := os.environ.get(variable):
        return Path(chosen).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, name)
    if sys.platform == "win32" and (caches := os.environ.get("LOCALAPPDATA")):
        return Path(caches, name, "Cache")
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / name
