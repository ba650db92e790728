"""Here adapters have layers in all of SDXL's blocks, and so has the base."""

from pathlib import Path

import pytest

from tests.conftest import build_pipeline


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline with attention in every block that has it in SDXL."""
    path = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    build_pipeline().save_pretrained(path)
    return path
