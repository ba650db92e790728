"""The project's command lines in processes of their own that have the slow imports behind them."""

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
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = "train_dreambooth_flat.py"


@dataclass
class Running:
    """A process that runs a command line: `pid` is real, and so are the signals that it gets."""

    process: BaseProcess
    logs: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def code(self) -> int | None:
        """Exit code, negative after a signal, or None while it runs."""
        return self.process.exitcode

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
        self.process.join()

    def wait(self, seconds: float = 300) -> int:
        self.process.join(seconds)
        assert self.code is not None, f"it still runs after {seconds} s: {self.stderr[-2000:]}"
        return self.code

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
    """Starts command lines: a server that has imported everything forks a process for each.

    The server has computed nothing, so a forked process is what a new one is after its imports.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Running] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.conftest"])
        with pytest.MonkeyPatch.context() as patch:
            for library in ("DIFFUSERS", "TRANSFORMERS"):  # as the script does before it imports them
                patch.setenv(f"{library}_VERBOSITY", "error")
            forkserver.ensure_running()

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
        process = self._context.Process(target=_become, args=(command, logs, prepare), daemon=True)
        process.start()
        self._started.append(Running(process, logs))
        return self._started[-1]

    def run(self, *words: object, prepare: Callable[[], None] | None = None) -> Running:
        """The same to its end."""
        running = self.start(*words, prepare=prepare)
        running.wait()
        return running

    def close(self) -> None:
        """Kill what a failed test left."""
        for running in self._started:
            if running.code is None:
                running.kill()


def _become(command: list[str], logs: Path, prepare: Callable[[], None] | None) -> None:
    gc.freeze()  # what the imports left isn't searched for garbage in every process
    for descriptor in (1, 2):
        log = os.open(logs / str(descriptor), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, descriptor)
        os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.chdir(ROOT)
    sys.argv = command
    if prepare is not None:
        prepare()
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        sys.modules.pop(command[0], None)
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
