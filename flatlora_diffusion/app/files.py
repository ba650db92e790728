"""Files that are handed out."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

KEPT_SECONDS = 3600  # of what a visitor has drawn last


def zipped(folder: Path, name: str) -> Path:
    """A ZIP of a folder's files, beside them."""
    files = sorted(folder.iterdir())
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    return path


def forget(folders: Iterable[Path]) -> None:
    """Delete folders that were handed out."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
