"""What pytest is told about every test; what tests are made of is in `tests/tiny.py`."""

import gc
import logging
import os
import warnings

# Before torch is imported: results must not depend on how busy the machine is, and one test run must not
# fight another for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: many tests wait for a process, a browser or the disk."""
    return (os.cpu_count() or 1) + 2


def pytest_configure(config: pytest.Config) -> None:
    """Import the models and fixtures of the tests, except where workers run them all.

    Workers start when the process that directs them is ready: it needn't import torch first.
    """
    if config.option.dist != "no":  # it is "no" in each worker
        return
    with warnings.catch_warnings():  # libraries' remarks on each other are no news
        warnings.simplefilter("ignore")
        logging.disable()
        config.pluginmanager.import_plugin("tests.tiny")
        logging.disable(logging.NOTSET)
    if hasattr(os, "fork"):
        from tests.script import SERVER, Server

        config.stash[SERVER] = Server()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the server of processes end, where there is one."""
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
