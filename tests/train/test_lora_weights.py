"""`--lora_weights`: training that starts from an adapter file, in whatever format it is read."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_tensors
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.output.checkpoint import find_checkpoint
from flatlora_diffusion.train import learner
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from tests.adapter.test_formats import saved_by_peft
from tests.tiny import UNET_TARGETS, assert_equal, run, stop_after


class Start(Callback):
    """Takes what a run starts from."""

    def on_train_begin(self, run):
        self.tensors = {key: tensor.clone() for key, tensor in adapter_tensors(run.models).items()}


def start_of(config, **changes):
    start = Start()
    train(dataclasses.replace(config, **changes), [start])
    return start.tensors


@pytest.mark.slow
def test_every_format_is_the_same_start(config, tmp_path):
    first = run(config, lora_alpha=2.0, max_train_steps=2)
    file, kohya = Path(config.output_dir, WEIGHTS_NAME), tmp_path / "kohya.safetensors"
    convert(file, kohya, 1)
    short = {"lora_alpha": 2.0, "max_train_steps": 1}
    for number, path in enumerate((file, file.parent, kohya)):
        start = start_of(config, lora_weights=str(path), output_dir=str(tmp_path / str(number)), **short)
        assert_equal(start, first)


@pytest.mark.slow
def test_an_adapter_of_peft_is_a_start(config, tmp_path):
    settings = {"r": 4, "lora_alpha": 4, "target_modules": UNET_TARGETS, "use_dora": True}
    saved_by_peft(tmp_path / "peft", slim=True, **settings)
    start = start_of(config, use_dora=True, max_train_steps=1, lora_weights=str(tmp_path / "peft"))
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(start) == len(theirs)
    for key, tensor in start.items():
        own = key.removeprefix("unet.").replace("lora.down", "lora_A").replace("lora.up", "lora_B")
        assert torch.equal(tensor, theirs[f"base_model.model.{own}"]), key


@pytest.mark.slow
def test_resumes_to_the_same_bits_and_knows_its_start_by_content(config, tmp_path):
    run(config, output_dir=str(tmp_path / "first"), max_train_steps=2)
    file = tmp_path / "first" / WEIGHTS_NAME
    config = dataclasses.replace(config, lora_weights=str(file), max_train_steps=3)
    whole = run(config, output_dir=str(tmp_path / "whole"))
    stop_after(config, 2)
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    assert_equal(run(config, lora_weights=str(moved), resume_from_checkpoint="latest"), whole)
    assert_equal(start_of(config, max_train_steps=1, output_dir=str(tmp_path / "x")), load_file(file))
    other = load_file(file)
    other[next(iter(other))] += 1
    save_file(other, moved)
    with pytest.raises(UserError, match=r"belongs to other settings \(start of the LoRA"):
        run(config, lora_weights=str(moved), resume_from_checkpoint="checkpoint-2")


def test_what_differs_is_named_before_anything_is_encoded(config, tmp_path, monkeypatch):
    first = run(config, max_train_steps=1)
    monkeypatch.setattr(learner, "encode_images", lambda *arguments: pytest.fail("images were encoded"))
    path = f"{config.output_dir}/{WEIGHTS_NAME}"
    bad = tmp_path / "bad.safetensors"
    save_file(dict(list(first.items())[2:]), bad)
    ranks = tmp_path / "ranks.safetensors"
    halved = {
        key: tensor[:2] if len(tensor) == 4 else tensor[:, :2] for key, tensor in list(first.items())[:2]
    }
    save_file(first | {key: tensor.contiguous() for key, tensor in halved.items()}, ranks)
    poisoned = tmp_path / "poisoned.safetensors"
    save_file({key: tensor * torch.nan for key, tensor in first.items()}, poisoned)
    for changes, message in (
        ({"rank": 2}, r"\(rank 4 there and 2 here\); set --rank"),
        ({"lora_alpha": 8.0}, r"scale \(alpha / rank\) 1 there and 2 here"),
        ({"use_dora": True}, "DoRA here and not there"),
        ({"train_text_encoder": True}, "it adapts unet, and this run text_encoder, text_encoder_2, unet"),
        ({"lora_layers": ("to_q",)}, "its layers aren't those of this run .* missing here"),
        ({"lora_weights": str(bad)}, "its layers aren't those of this run .* missing there"),
        (
            {"lora_weights": str(ranks)},
            r"\(rank 2, 4 there and 4 here\); set --lora_layers \(with its ranks\)",
        ),
        ({"lora_weights": str(poisoned)}, "values that aren't finite"),
        ({"lora_weights": str(tmp_path / "gone")}, "gone: not a sound safetensors file"),
        ({"init_lora_weights": "pissa"}, "--lora_weights with --init_lora_weights pissa"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(config, **({"lora_weights": path, "output_dir": str(tmp_path / "out")} | changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


@pytest.mark.slow
def test_a_checkpoint_of_diffusers_is_named_and_its_adapter_taken(config, tmp_path):
    first = run(config, max_train_steps=1)
    theirs = tmp_path / "theirs" / "checkpoint-500"
    theirs.mkdir(parents=True)
    save_file(first, theirs / WEIGHTS_NAME, metadata={LORA_ADAPTER_METADATA_KEY: "{}"})
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (theirs / name).write_bytes(b"never read")
    for output, wanted in ((tmp_path / "new", str(theirs)), (theirs.parent, "latest")):
        message = rf"checkpoint of the diffusers script.*--lora_weights {theirs}/{WEIGHTS_NAME}"
        with pytest.raises(UserError, match=message):
            find_checkpoint(output, wanted, {})
    start = start_of(
        config, lora_weights=str(theirs), max_train_steps=1, output_dir=str(tmp_path / "from theirs")
    )
    assert_equal(start, first)
