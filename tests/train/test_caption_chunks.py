"""--caption_chunks: captions longer than the text encoders read, in training, grids and evaluation."""

import dataclasses
import json

import pytest
import torch

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Path, find_samples
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.draw.stamp import read
from flatlora_diffusion.evaluate.denoising import DenoisingSet, embed
from flatlora_diffusion.evaluate.merged import merged_unet
from flatlora_diffusion.grid.command import main
from flatlora_diffusion.grid.recipe import Recipe, differences
from tests.tiny import assert_equal, run, stop_after

LONG = " ".join(["a"] * 75)


@pytest.fixture
def config(config, icons) -> TrainConfig:
    """Captions that are told apart beyond the 75 tokens of a piece."""
    (icons / "metadata.jsonl").unlink()
    return dataclasses.replace(config, instance_prompt=f"{LONG} red", flat_sigma=0.0, max_train_steps=2)


def differ(one, other) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True], ids=["unet", "with text encoders"])
def test_words_beyond_the_first_piece_count_and_a_stopped_run_ends_in_the_same_bits(
    config, tmp_path, text_encoders
):
    config = dataclasses.replace(config, caption_chunks=2, train_text_encoder=text_encoders)
    red = run(config)
    facts = read_facts(tmp_path / "run" / WEIGHTS_NAME)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["caption_chunks"] == summary["settings"]["caption_chunks"] == 2
    assert "| caption chunks | 2 |" in (tmp_path / "run" / "README.md").read_text()
    again = {"output_dir": str(tmp_path / "again")}
    stop_after(config, 1, **again)
    assert_equal(red, run(config, resume_from_checkpoint="latest", **again))
    other = {"instance_prompt": f"{LONG} blue", "output_dir": str(tmp_path / "blue")}
    assert differ(red, run(config, **other))


def test_without_pieces_they_do_not_count_and_nothing_new_is_recorded(config, tmp_path, caplog):
    red = run(config)
    assert_equal(red, run(config, instance_prompt=f"{LONG} blue", output_dir=str(tmp_path / "blue")))
    assert caplog.text.count("--caption_chunks 2 reads all of it") == 2
    assert "caption_chunks" not in read_facts(tmp_path / "run" / WEIGHTS_NAME)


def test_the_evaluation_measures_the_loss_that_training_logged(config, icons, base_path, tmp_path):
    run(config, caption_chunks=2, heldout_data_dir=str(icons), learning_rate=1e-2)
    logged = json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_losses"]["2"]
    pipeline = load_pipeline(str(base_path))
    shown = DenoisingSet(pipeline, find_samples(icons, config.instance_prompt), 16, 8)
    load_adapter(pipeline, "lora", tmp_path / "run")
    unet = merged_unet(pipeline, "lora")
    losses = {n: shown.mean_loss(unet, embed(pipeline, "lora", shown.captions, n)) for n in (1, 2)}
    assert losses[2] == pytest.approx(logged, rel=1e-5) and losses[1] != pytest.approx(logged, rel=1e-4)


def test_a_grid_draws_what_lies_beyond_and_records_it(base_path, tmp_path, caplog):
    prompts = [f"{LONG} red", f"{LONG} blue"]
    words = ["--base", str(base_path), "--steps", "1", "--device", "cpu", "--prompt", *prompts]
    for chunks in (1, 2):
        main([*words, "--caption_chunks", str(chunks), "--output", str(tmp_path / str(chunks))])
        files = sorted((tmp_path / str(chunks)).glob("*seed*.png"))
        stamps = [read(file) for file in files]
        pixels = {Path(file).read_bytes().split(b"IDAT")[1] for file in files}
        assert len(files) == 2 and len(pixels) == chunks
        assert {stamp.caption_chunks for stamp in stamps} == {chunks}
    assert caplog.text.count("--caption_chunks 2 reads all of it") == 2
    assert Recipe.load(tmp_path / "2").drawing.caption_chunks == 2
    manifests = [json.loads((tmp_path / str(chunks) / "manifest.json").read_text()) for chunks in (1, 2)]
    assert differences(*manifests) == ["caption_chunks"]
    del manifests[0]["grid"]["drawing"]["caption_chunks"]  # as grids were written before
    (tmp_path / "1" / "manifest.json").write_text(json.dumps(manifests[0]))
    main([*words, "--output", str(tmp_path / "1")])
