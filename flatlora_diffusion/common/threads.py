"""How the threads that compute on a CPU wait for each other."""

from __future__ import annotations

import os

import psutil

MOMENT = 0.3  # seconds


def share_processor() -> None:
    """On a busy machine, let threads that wait sleep; to be called before torch is imported.

    The threads of OpenMP spin while they wait. That is fastest where cores are free. Where others compute,
    they take the cores from the very threads for which they wait, and a step of a small base takes several
    times as long (`benchmarks/busy.py`). Results don't depend on it. The user's own settings win.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    # More than half of the cores in the last minute: another program that computes, and not one of a moment.
    # And still so: what has just ended, an installation say, counts for minutes in that mean.
    if psutil.getloadavg()[0] > (psutil.cpu_count() or 1) / 2 and psutil.cpu_percent(interval=MOMENT) > 50:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
