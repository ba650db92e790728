"""Where and in which precision to compute, and giving memory back."""

from __future__ import annotations

import gc

import torch

from flatlora_diffusion.common.command import DTYPE_NAMES
from flatlora_diffusion.common.errors import UserError

_KINDS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES: dict[str, torch.dtype] = dict(zip(DTYPE_NAMES, _KINDS, strict=True))


def release() -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_device() -> str:
    """The accelerator at hand, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(name: str | None) -> str:
    """The device of the flag --device, or where it isn't given the default one.

    Raises:
        UserError: This machine has no such device.
    """
    if name is None:
        return default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
