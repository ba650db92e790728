"""Ctrl-C and SIGTERM: an exception, at once or after a block, or a request that the training loop answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked to stop, and which.

    Attributes:
        signal_number: The signal, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second one interrupts at once."""
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def sigterm_interrupts() -> Generator[None]:
    """Within the block SIGTERM raises `KeyboardInterrupt(SIGTERM)`: what has begun is left in good order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_request() -> Generator[StopRequest]:
    """Within the block, SIGINT and SIGTERM are noted instead of obeyed at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Generator[None]:
    """SIGINT and SIGTERM that come within the block take effect after it: it is done whole or not begun."""
    request = StopRequest()
    try:
        with stop_request() as request:
            yield
    finally:
        if request.signal_number is not None:
            signal.raise_signal(request.signal_number)
