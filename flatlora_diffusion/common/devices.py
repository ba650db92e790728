"""Where and in which precision to compute, what it means that memory ran out, and giving memory back."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Generator
from typing import TypeVar

import torch
from torch import nn

from flatlora_diffusion.common.command import DTYPE_NAMES
from flatlora_diffusion.common.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_KINDS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES: dict[str, torch.dtype] = dict(zip(DTYPE_NAMES, _KINDS, strict=True))


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's allocator and driver, ROCm's, MPS's
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSPARSE
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle wants memory too
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's or the machine's memory ran out, whichever library says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def out_of_memory_as_error(told: str) -> Generator[None]:
    """Raise a `UserError` where memory runs out inside the block.

    Args:
        told: What for, and what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {told}") from error


def if_memory_lasts(work: Callable[[], Result], otherwise: Callable[[], Result], told: str) -> Result:
    """What `work` gives; where memory runs out in it, what `otherwise` gives, after a warning.

    Args:
        work: Is tried.
        otherwise: Needs less memory. That of `work` has been given back when it is called.
        told: What for memory ran out, and what follows.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, whose traceback held on to the tensors.
    release()
    logger.warning("out of memory %s", told)
    return otherwise()


def require_room(model: nn.Module, device: torch.device, what: str, remedy: str) -> None:
    """Refuse a model whose parameters alone are more than a GPU has memory.

    Args:
        model: It need not be on the device.
        device: On the CPU nothing is refused: it has other ways to make room.
        what: What the model is.
        remedy: What to do.

    Raises:
        UserError: It doesn't fit.
    """
    if device.type != "cuda":
        return
    needed = sum(parameter.nbytes for parameter in model.parameters())
    there = torch.cuda.mem_get_info(device)[1]
    if needed > there:
        sizes = f"takes {needed / 2**30:.1f} GiB, and {device} has {there / 2**30:.1f}"
        raise UserError(f"{what} {sizes}; {remedy}")


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Generator[None]:
    """Have PyTorch use only algorithms that repeat to the bit inside the block, where that is wanted.

    On CUDA others add in an order that differs from time to time. What has no such algorithm raises.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch insists on it
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def release() -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


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
