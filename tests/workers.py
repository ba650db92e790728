"""The processes that run the tests, forked from one that has imported all of them.

pytest-xdist starts each by a command, `--tx popen//python=COMMAND`. Here the command is this file: it hands
its standard streams to a process that has the tests imported, and a copy of that one becomes the worker. The
imports, and the rewriting of assertions, are done once instead of in each worker.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
LATE = (
    "diffusers.guiders",
    "diffusers.schedulers.scheduling_ddim",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "mpl_toolkits.mplot3d",
    "numpy.ma",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.tensorboard",
)
"""What is imported when it is first used, and is used by many tests."""


class Workers:
    """A copy of this process that imports test files, and becomes a worker for each `command` that is run.

    Args:
        paths: The files, and folders of files, as pytest is given them.
    """

    def __init__(self, paths: list[str]) -> None:
        self._folder = tempfile.mkdtemp(prefix="workers-")  # nobody else's process gets in
        address = f"{self._folder}/socket"
        self.command = shlex.join([sys.executable, "-I", "-S", __file__, address])
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        alive, self._alive = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(self._alive)
                _import_tests(paths)
                _serve(listener, alive)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        listener.close()
        os.close(alive)

    def close(self) -> None:
        """End the copy; each of its workers ends with its standard input."""
        os.close(self._alive)
        os.waitpid(self._pid, 0)
        shutil.rmtree(self._folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries' remarks on each other, when they are imported, are no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        yield
        logging.disable(logging.NOTSET)


def _import_tests(paths: list[str]) -> None:
    import pytest

    from flatlora_diffusion.app.imports import without_stubs

    files = [ROOT / "tests" / "tiny.py"]
    pytest.register_assert_rewrite("tests.tiny")
    for path in (Path(path.partition("::")[0]).resolve() for path in paths):
        files += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    gc.disable()
    with quiet(), without_stubs():
        for file in files:
            # A worker comes to what fails once more, and tells of it.
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for name in LATE:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no worker's search for garbage looks through it
    gc.enable()


def _serve(listener: socket.socket, alive: int) -> None:
    """Let a copy become a worker for each that asks, until the process that began this one is gone."""
    while alive not in wait([listener, alive]):
        asking, _ = listener.accept()
        streams = socket.recv_fds(asking, 1, 3)[1]
        if not os.fork():
            listener.close()
            os.close(alive)
            _work(streams)
            return
        asking.close()
        for stream in streams:
            os.close(stream)


def _work(streams: list[int]) -> None:
    """Do what `python -c` does with the line that execnet gives it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", 1, closefd=False) for n in range(3))
    exec(eval(sys.stdin.readline()), {"__name__": "__main__"})


def _ask(address: str) -> None:
    """Hand the standard streams over, and wait until the worker has ended."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], [0, 1, 2])
        os.close(0)
        os.close(1)
        server.recv(1)


if __name__ == "__main__":
    _ask(sys.argv[1])
