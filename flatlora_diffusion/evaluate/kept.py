"""What was measured, as JSON in the evaluation's folder: kept part by part, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically


def stored(file: Path, key: str) -> dict[str, Any] | None:
    """What an earlier evaluation measured in the same way.

    Args:
        file: Of the part.
        key: A hash of all that decides what the part measures.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["result"] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it was damaged
        return None


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write what is kept, as JSON.

    Raises:
        UserError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be made ({error.strerror})") from error
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())


def finite(content: Any) -> Any:
    """The same with None, which JSON has, for numbers that it hasn't."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def merge(target: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put values into a nested dictionary, beside those that are there."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            merge(target[name], value)
        else:
            target[name] = value
