"""The output folder: refused where nothing can be written, and held by one run at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Generator
from pathlib import Path

from filelock import lock_descriptor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.signals import signals_wait

logger = logging.getLogger(__name__)

LOCK_NAME = ".flatlora.lock"


def check_writable(flag: str, folder: Path) -> None:
    """Refuse an output folder that can't be made or written, before anything is loaded.

    Raises:
        UserError: Names the flag, the folder and the obstacle.
    """
    existing = folder
    while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a link to nowhere"
        raise UserError(f"{flag} {folder}: {existing} is {kind}, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} cannot be written to; give another folder")


@contextlib.contextmanager
def output_lock(folder: Path, flag: str = "--output_dir") -> Generator[None]:
    """Keep other runs out of an output folder, which is made where it doesn't exist.

    The lock is the system's on the file `.flatlora.lock`: it ends with the process, whatever ends
    that, so the file of a killed run locks nothing. On leaving, the file is removed, and so are the
    folders that were made and are still empty.

    Args:
        folder: To be held.
        flag: How the user named it, for errors.

    Raises:
        UserError: Another run has the lock, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        with signals_wait():  # no lock is taken without being given back
            descriptor = _take(folder, flag)
        yield
    finally:
        with signals_wait():
            if descriptor is not None:
                _give_back(descriptor, folder / LOCK_NAME)
            for path in made:
                with contextlib.suppress(OSError):  # something is in it
                    path.rmdir()


def _take(folder: Path, flag: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(folder / LOCK_NAME)
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror}); give another folder"
        ) from error
    if descriptor is None:
        raise UserError(
            f"{flag} {folder}: another run{_holder(folder / LOCK_NAME)} writes to it; "
            "wait until it has ended, or give another folder"
        )
    return descriptor


def _open_locked(path: Path) -> int | None:
    """A descriptor of the file that holds its lock; None where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                return None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): take care that no other run writes there", path, error.strerror
            )
            return descriptor
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # the run that had it removed the file in between
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        os.ftruncate(descriptor, 0)
        # After the first byte, which Windows shows to nobody else while it is locked.
        os.write(descriptor, f" process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _give_back(descriptor: int, path: Path) -> None:
    if os.name == "nt":  # no open file is removed there, nor one that the next run has opened since
        os.close(descriptor)
    with contextlib.suppress(OSError):  # elsewhere while it is locked: nobody else can hold it
        path.unlink()
    if os.name != "nt":
        os.close(descriptor)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(1)
        if holder := file.read().decode():
            return f" ({holder})"
    return ""
