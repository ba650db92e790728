"""Here adapters have layers in all of SDXL's blocks, and so has the base."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline with attention in every block that has it in SDXL."""
    from tests.tiny import build_pipeline  # not before that has been imported as a plugin

    path = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    build_pipeline().save_pretrained(path)
    return path
