"""Latents and embeddings that are kept: no run ends otherwise for it, and nothing is encoded twice."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from flatlora_diffusion.data import latents as data_latents
from flatlora_diffusion.train import learner
from flatlora_diffusion.train.arms import train
from tests.tiny import assert_equal, run, stop_after


@pytest.fixture
def encoded(monkeypatch):
    """The names of the encoders that were called, one for each call."""
    calls = []

    def count(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or original(*args))

    count(learner, "encode_images")
    count(data_latents, "encode_prompts")
    return calls


def test_a_run_ends_in_the_same_bits_with_and_without(config, encoded, caplog):
    caplog.set_level("INFO")
    folder = Path(os.environ["FLATLORA_CACHE"])
    changes = {"random_flip": True, "max_train_steps": 3}
    without = run(config, cache=False, **changes)
    assert not folder.exists()
    calls = encoded.copy()
    encoded.clear()
    first = run(config, output_dir=f"{config.output_dir}-first", **changes)
    assert encoded == calls
    assert sum(f"found in {folder / 'encodings'}" in message for message in caplog.messages) == 2
    encoded.clear()
    stop_after(config, 2, output_dir=f"{config.output_dir}-stopped", **changes)
    resumed = run(
        config, output_dir=f"{config.output_dir}-stopped", resume_from_checkpoint="latest", **changes
    )
    assert not encoded
    assert_equal(first, without)
    assert_equal(resumed, without)


def test_only_what_is_new_is_encoded(config, encoded, icons):
    run(config, max_train_steps=1)
    encoded.clear()
    captions = [
        {"file_name": "red.png", "text": "a red thing"},
        {"file_name": "blue.png", "text": "a blue icon"},
    ]
    (icons / "metadata.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))
    (icons / "green.png").write_bytes((icons / "red.png").read_bytes())
    run(config, max_train_steps=1, output_dir=f"{config.output_dir}-again")
    assert encoded == ["encode_prompts"], "red was encoded before, whatever it is called"


def test_both_arms_of_a_comparison_are_encoded_once(config, encoded):
    changes = {"compare": True, "cache": False, "max_train_steps": 1, "num_validation_images": 0}
    train(dataclasses.replace(config, **changes))
    assert encoded.count("encode_images") == 4
    assert encoded.count("encode_prompts") == 4, "three captions and the empty prompt"


def test_text_encoders_that_were_trained_are_asked_anew(config, encoded):
    changes = {"train_text_encoder": True, "train_text_encoder_frac": 0.5, "max_train_steps": 2}
    run(config, **changes)
    calls = encoded.count("encode_prompts")
    encoded.clear()
    run(config, output_dir=f"{config.output_dir}-again", **changes)
    assert encoded == ["encode_prompts"] * calls
