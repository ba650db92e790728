"""How much memory this process has needed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil


def peak_memory() -> int:
    """The most bytes of physical memory that this process has held at once, since it began.

    On Linux `VmHWM`; on Windows the peak of the working set; on macOS `ru_maxrss`.
    """
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    return _ru_maxrss() * (1 if sys.platform == "darwin" else 1024)


def _ru_maxrss() -> int:
    """Of `getrusage`, in the system's unit; without the module `resource`, which not all systems have."""
    usage = (ctypes.c_long * 64)()  # begins with two times of two words each; more room than any system needs
    if ctypes.CDLL(None).getrusage(0, usage):
        raise OSError("getrusage failed")
    return usage[4]
