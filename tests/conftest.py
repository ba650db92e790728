"""What pytest is told about every test; what tests are made of is in `tests/tiny.py`."""

import gc
import os
import sys

# Before torch is imported: results must not depend on how busy the machine is, and one test run must not
# fight another for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.workers import Workers, quiet

WORKERS = pytest.StashKey[Workers]()


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: many tests wait for a process, a browser or the disk."""
    return (os.cpu_count() or 1) + 2


def pytest_configure(config: pytest.Config) -> None:
    """Import the models and fixtures of the tests, except where workers run them all."""
    if config.option.dist != "no":  # it is "no" in each worker
        if sys.platform == "linux":
            workers = config.stash[WORKERS] = Workers(config.args)
            forked = f"popen//python={workers.command}"
            config.option.tx = [forked if kind == "popen" else kind for kind in config.option.tx]
        return
    with quiet():
        config.pluginmanager.import_plugin("tests.tiny")
    if hasattr(os, "fork"):
        from tests.script import SERVER, Server

        config.stash[SERVER] = Server()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the processes that are forked from end, where there are any."""
    if workers := config.stash.get(WORKERS, None):
        workers.close()
    if config.option.dist == "no":
        from tests.script import SERVER

        if server := config.stash.get(SERVER, None):
            server.close()


def pytest_collection_finish() -> None:
    """Keep what libraries and test modules brought out of every later search for garbage.

    A run collects garbage several times (`release`), and each search would look through all of it again.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they start: see the markers in `pyproject.toml`."""
    for item in items:
        for fixture, marker in (("launcher", "process"), ("open_page", "browser")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
