"""The trainer's progress bar: steps, and what else takes time, told as what it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tqdm import tqdm


class StepBar(tqdm):
    """A bar over optimizer steps, whose rate and time left are those of steps alone.

    Args:
        method: What the bar is called.
        start: Steps that were done before.
        total: Steps of the run.
        hidden: Nothing is shown.
    """

    def __init__(self, method: str, start: int, total: int, *, hidden: bool = False) -> None:
        self.method = method
        super().__init__(total=total, initial=start, desc=method, unit="step", disable=hidden)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Within the block something else is done than steps, and the bar says what."""
        if self.disable:
            yield
            return
        began = time.time()  # tqdm's own clock
        self.set_description(f"{self.method}, {what}")
        try:
            yield
        finally:
            took = time.time() - began
            # As if that time had not been: tqdm tells the rate from these two.
            self.start_t += took
            self.last_print_t += took
            self.set_description(self.method)
