"""`make demo` on the shipped base and icons, cut short."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.train.arms import train

PROJECT = Path(__file__).parents[2]


def demo_config(monkeypatch, *flags):
    monkeypatch.chdir(PROJECT)  # as make runs it
    return parse_train_config(["--config", "assets/demo.yaml", *map(str, flags)])


def test_the_demo_compares_trained_and_untrained_subjects_and_the_styles_of_the_base(monkeypatch):
    config = demo_config(monkeypatch)
    assert config.compare
    trained = {sample.caption for sample in find_samples(Path(config.instance_data_dir), "")}
    assert len(trained) == 23
    prompts = set(config.validation_prompt)
    new_style = {prompt for prompt in prompts if "fluent 3d" in prompt}
    assert new_style & trained and new_style - trained and prompts - new_style


@pytest.mark.slow
def test_the_demo_ends_with_its_picture(monkeypatch, tmp_path, caplog):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    shutil.copy(PROJECT / "assets/icons-3d-heldout/watermelon.png", heldout)
    caption = {"file_name": "watermelon.png", "text": "a fluent 3d icon of watermelon"}
    (heldout / "metadata.jsonl").write_text(json.dumps(caption))
    short = ["--max_train_steps", 1, "--validation_inference_steps", 1, "--report_to", "none"]
    short += ["--heldout_data_dir", heldout]
    caplog.set_level("INFO")
    train(demo_config(monkeypatch, *short, "--output_dir", tmp_path / "out"))
    picture = tmp_path / "out" / "comparison.png"
    assert f"the comparison is in {picture}" in caplog.messages
    assert f"--run {tmp_path / 'out'}" in caplog.messages[-1]
    with Image.open(picture) as sheet:
        assert sheet.width > 600 and sheet.height > 600
    folder = tmp_path / "out" / "comparison"
    rows = json.loads((folder / "manifest.json").read_text())["rows"]
    shown = {row["prompt"]: (folder / row["reference"]).resolve() for row in rows if "reference" in row}
    trained = {
        prompt: file
        for prompt, file in shown.items()
        if prompt != caption["text"] and file.parent == PROJECT / "assets/icons-3d"
    }
    assert shown == {**trained, caption["text"]: heldout / "watermelon.png"} and len(trained) == 1
