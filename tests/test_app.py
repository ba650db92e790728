"""The page over HTTP, as a browser's requests reach it."""

import subprocess
import sys
from pathlib import Path

import pytest
from gradio_client import Client
from PIL import Image

import app
from flatlora_diffusion.generate import Drawing, draw_with, load_adapter, load_pipeline

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def client(base_path, adapters):
    studio = app.Studio(str(base_path), adapters, resolution=16, device="cpu", dtype="fp32")
    page = app.build(studio, "a icon", steps=2, guidance=3.0)
    page.queue(api_open=False)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


def test_three_pictures_are_those_of_lone_requests(client, base_path, adapters):
    shown = client.predict("a red icon", 5, 2, 3.0, api_name="/compare")
    pipeline = load_pipeline(str(base_path))
    for path, (label, adapter) in zip(shown, [("base", None), *adapters.items()], strict=True):
        if adapter is not None:
            load_adapter(pipeline, label, adapter)
        name = None if adapter is None else label
        expected = draw_with(pipeline, name, "a red icon", 5, Drawing(16, 16, 2, 3.0))
        assert Image.open(path).convert("RGB").tobytes() == app.enlarge(expected).tobytes()


def test_an_empty_or_endless_prompt_is_refused(client):
    for prompt in ("  ", "x" * 500):
        with pytest.raises(Exception, match=r"prompt must have 1 to 400 characters"):
            client.predict(prompt, 0, 2, 3.0, api_name="/compare")


def test_without_adapters_it_says_what_to_do(tmp_path):
    command = [sys.executable, str(PROJECT / "app.py"), "--adapter", "broken"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --adapter: broken: must be NAME=PATH"
