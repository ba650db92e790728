"""The project's command lines in processes of their own that have the slow imports behind them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parents[1]
SCRIPT = "train_dreambooth_flat.py"


class Server:
    """A copy of this process as it is now, that forks a process for each command line.

    It is made when everything is imported and nothing computed, so a forked process is what a new one is
    after its imports.
    """

    def __init__(self) -> None:
        self.orders, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if not self._pid:
            self.orders.close()
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def close(self) -> None:
        self.orders.close()
        os.waitpid(self._pid, 0)


SERVER = pytest.StashKey[Server]()
"""Where pytest's configuration keeps it."""


def _serve(orders: Connection) -> None:
    """Start what is ordered, and tell how each ends, until nobody is there to order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in (diffusers_logging, transformers_logging):  # the script says so before it imports them
        library.set_verbosity_error()
    gc.freeze()  # what the imports left isn't searched for garbage in every process
    context = multiprocessing.get_context("fork")
    running = {}
    while True:
        for ready in wait([orders, *running]):
            if ready is orders:
                try:
                    order = orders.recv()
                except EOFError:
                    return
                process = context.Process(target=_become, args=order)
                process.start()
                running[process.sentinel] = process
                orders.send((process.pid, None))
            else:
                process = running.pop(ready)
                process.join()
                orders.send((process.pid, process.exitcode))


def _become(command: list[str], logs: Path, environment: dict[str, str], prepare: Callable | None) -> None:
    for descriptor in (1, 2):
        log = os.open(logs / str(descriptor), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, descriptor)
        os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    if prepare is not None:
        prepare()
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        sys.modules.pop(command[0], None)
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


@dataclass
class Running:
    """A process that runs a command line: `pid` is real, and so are the signals that it gets."""

    pid: int
    logs: Path
    launcher: Launcher
    ended: int | None = None

    @property
    def code(self) -> int | None:
        """Exit code, negative after a signal, or None while it runs."""
        self.launcher.listen(0)
        return self.ended

    @property
    def stdout(self) -> str:
        return self._written(1)

    @property
    def stderr(self) -> str:
        return self._written(2)

    def _written(self, descriptor: int) -> str:
        log = self.logs / str(descriptor)
        return log.read_text() if log.exists() else ""  # the process has only begun

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        while self.ended is None and (left := end - time.monotonic()) > 0:
            self.launcher.listen(left)
        assert self.ended is not None, f"it still runs after {seconds} s: {self.stderr[-2000:]}"
        return self.ended

    def wait_until(self, happened: Callable[[], object], seconds: float = 300) -> bool:
        """Until something has happened; False where the process ended before."""
        end = time.monotonic() + seconds
        while not happened():
            if self.code is not None:
                return False
            assert time.monotonic() < end, f"it didn't happen: {self.stderr[-2000:]}"
            time.sleep(0.001)
        return True


class Launcher:
    """Starts command lines, through a server.

    Args:
        orders: The way to the server.
        folder: Where the processes' output is kept.
        environment: Variables of the processes.
    """

    def __init__(self, orders: Connection, folder: Path, environment: dict[str, str]) -> None:
        self._orders, self._folder, self._environment = orders, folder, environment
        self._started: dict[int, Running] = {}

    def start(self, *words: object, prepare: Callable[[], None] | None = None) -> Running:
        """Run the script with these arguments, in the repository's folder.

        Args:
            words: The arguments. A first one that is `-m` runs the module after it instead of the training
                script; a first one that ends in `.py`, that script.
            prepare: Called first in the new process: what is to be different there.
        """
        logs = Path(tempfile.mkdtemp(dir=self._folder))
        command = [str(word) for word in words]
        if command[:1] == ["-m"]:
            del command[0]
        elif not command or not command[0].endswith(".py"):
            command.insert(0, SCRIPT)
        self._orders.send((command, logs, self._environment, prepare))
        while (pid := self.listen(60)) is None:
            pass
        self._started[pid] = Running(pid, logs, self)
        return self._started[pid]

    def listen(self, seconds: float) -> int | None:
        """Hear what the server has to say within some time; the number of a process that it has started."""
        if not self._orders.poll(seconds):
            return None
        pid, code = self._orders.recv()
        if code is None:
            return pid
        self._started.pop(pid).ended = code
        return None

    def run(self, *words: object, prepare: Callable[[], None] | None = None) -> Running:
        """The same to its end."""
        running = self.start(*words, prepare=prepare)
        running.wait()
        return running

    def close(self) -> None:
        """Kill what a failed test left."""
        for running in list(self._started.values()):
            running.kill()
