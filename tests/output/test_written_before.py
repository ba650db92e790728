"""What a version before the wings has left behind is read, drawn again and trained on as by that version.

`written_before/` was written by commit a072312, the last one with a flat package: a comparison of 4 steps on
the tiny base of `tests/tiny.py`, its three icons, and the checkpoint after the second step of its
Flat-LoRA.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.output.names import SUMMARY
from flatlora_diffusion.output.reading import find_runs
from flatlora_diffusion.train.arms import train
from tests.tiny import build_pipeline

WRITTEN = Path(__file__).parent / "written_before"


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """A copy of it with its base: its settings name them relative to the working folder."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    build_pipeline().save_pretrained(tmp_path / "tiny-sdxl")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "compared"


def test_its_runs_are_read(written):
    runs = find_runs(written)
    assert list(runs) == ["LoRA", "Flat-LoRA"]
    flat = runs["Flat-LoRA"].read()
    assert flat.finished and len(flat.losses) == 4 and [step for step, _ in flat.heldout] == [2, 4]
    assert flat.sigmas[-1][1] == pytest.approx(0.3 * 0.5 * (1 + 2**-0.5))
    assert (flat.facts["method"], flat.facts["rank"], flat.facts["steps"]) == ("Flat-LoRA", 2, 4)
    assert flat.settings["flat_sigma"] == 0.3
    assert [step for step, _ in flat.validation] == [4]
    assert flat.gaps == []


@pytest.mark.slow
def test_its_checkpoint_goes_on_to_the_adapter_that_it_ended_in(written):
    flat = written / "flat_lora"
    ended = load_file(flat / WEIGHTS_NAME)
    for name in (WEIGHTS_NAME, SUMMARY):
        (flat / name).unlink()
    train(
        TrainConfig(
            pretrained_model_name_or_path="tiny-sdxl",
            instance_data_dir="icons",
            instance_prompt="a icon",
            output_dir="compared/flat_lora",
            flat_sigma=0.3,
            resolution=16,
            train_batch_size=2,
            max_train_steps=4,
            learning_rate=1e-2,
            rank=2,
            report_to="none",
            resume_from_checkpoint="latest",
        )
    )
    trained = load_file(flat / WEIGHTS_NAME)
    assert trained.keys() == ended.keys()
    for name, tensor in trained.items():
        # The same bits on the machine that wrote it; other processors and versions of torch round otherwise.
        torch.testing.assert_close(tensor, ended[name], rtol=1e-3, atol=1e-5)


def test_its_adapter_loads(written):
    pipeline = load_pipeline("tiny-sdxl")
    file = written / "flat_lora" / WEIGHTS_NAME
    facts = load_adapter(pipeline, "flat", file)
    assert facts.facts == read_facts(file) and facts.facts["settings_sha256"]


def test_its_comparison_is_drawn_again(written, launcher):
    done = launcher.run(
        "-m", "flatlora_diffusion.grid", "--manifest", written / "comparison", "--output", written / "again"
    )
    assert done.code == 0, done.stderr
    assert len(list((written / "again").glob("a_icon-seed0-*.png"))) == 3
