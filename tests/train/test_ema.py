"""The average of the adapter: a hand-written one, what it is used for, and a resume."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import (
    LIVE_NAME,
    WEIGHTS_NAME,
    adapter_tensors,
    load_adapter_tensors,
    read_facts,
)
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.train import validation
from flatlora_diffusion.train.ema import AdapterAverage
from flatlora_diffusion.train.learner import Learner
from tests.tiny import (
    TEXT_TARGETS,
    UNET_TARGETS,
    add_lora,
    assert_equal,
    build_text_encoders,
    build_unet,
    run,
    stop_after,
)

DECAY = 0.25  # reached at the third step; before it the average warms up


@pytest.fixture
def config(config) -> TrainConfig:
    return dataclasses.replace(
        config,
        max_train_steps=4,
        use_ema=True,
        ema_decay=DECAY,
        checkpointing_steps=1,
        train_text_encoder=True,
        text_encoder_lr=1e-3,
        learning_rate=1e-2,
    )


def live(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(images.Path(config.output_dir, LIVE_NAME))


@pytest.mark.slow
def test_it_is_the_average_written_by_hand(config, tmp_path):
    final = run(config)
    output = images.Path(config.output_dir)
    average = None
    for step in range(1, config.max_train_steps + 1):
        parameters = load_file(output / f"checkpoint-{step}" / LIVE_NAME)
        saved = load_file(output / f"checkpoint-{step}" / WEIGHTS_NAME)
        decay = 0.0 if step == 1 else min(DECAY, step / (step + 9))
        average = {
            name: p.double() if average is None else decay * average[name] + (1 - decay) * p.double()
            for name, p in parameters.items()
        }
        assert saved.keys() == average.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)
    assert_equal(final, saved)
    assert_equal(live(config), parameters)
    assert not any(torch.equal(final[name], parameters[name]) for name in final if name.startswith("unet."))
    assert read_facts(output / WEIGHTS_NAME)["ema_decay"] == DECAY
    assert read_facts(output / LIVE_NAME)["ema_decay"] is None
    # Training itself is that of a run without an average.
    plain = dataclasses.replace(config, use_ema=False, output_dir=str(tmp_path / "plain"))
    assert_equal(run(plain), parameters)
    assert not (tmp_path / "plain" / LIVE_NAME).exists()
    assert not (tmp_path / "plain" / "checkpoint-4" / LIVE_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gaussian", "pissa"])
def test_a_resumed_run_ends_in_the_same_average(config, tmp_path, start):
    config = dataclasses.replace(
        config, checkpointing_steps=100, init_lora_weights=start, train_text_encoder=False
    )
    undisturbed = run(config)
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    stop_after(resumed, 2)
    assert_equal(run(resumed, resume_from_checkpoint="latest"), undisturbed)
    assert_equal(live(resumed), live(config))


@pytest.mark.slow
def test_pictures_and_the_heldout_loss_are_the_averages(config, tmp_path, monkeypatch):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    Image.new("RGB", (20, 20), "navy").save(heldout / "0.png")
    plain = run(config, checkpointing_steps=100)
    shown = []

    def look(learner, config):
        shown.append({name: tensor.clone() for name, tensor in adapter_tensors(learner.trained).items()})
        return [Image.new("RGB", (16, 16))]

    monkeypatch.setattr(validation, "draw_validation", look)
    judged = dataclasses.replace(
        config,
        output_dir=str(tmp_path / "judged"),
        heldout_data_dir=str(heldout),
        heldout_steps=2,
        validation_prompt=("a icon",),
        validation_epochs=1,  # of two steps
        num_validation_images=1,
        validation_inference_steps=1,
    )
    assert_equal(run(judged), plain)  # and looking at it has changed nothing
    assert_equal(live(judged), live(config))
    output = images.Path(judged.output_dir)
    assert len(shown) == 2
    for index, tensors in enumerate(shown):
        assert_equal(tensors, load_file(output / f"checkpoint-{2 * index + 2}" / WEIGHTS_NAME))
    samples = find_samples(images.Path(config.instance_data_dir), config.instance_prompt)
    unseen = find_samples(heldout, config.instance_prompt)
    learner = Learner(judged, Accelerator(), samples, heldout_samples=unseen)
    load_adapter_tensors(learner.trained, plain)
    measured = json.loads((output / "summary.json").read_text())["heldout_losses"]
    assert measured["4"] == learner.heldout_loss()
    load_adapter_tensors(learner.trained, live(judged))
    assert measured["4"] != learner.heldout_loss()


def test_a_model_that_is_trained_no_further_keeps_its_average():
    unet, (text_encoder, _) = build_unet(), build_text_encoders()
    for model, targets in ((unet, UNET_TARGETS), (text_encoder, TEXT_TARGETS)):
        model.requires_grad_(False)
        add_lora(model, targets)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (unet, text_encoder)]
    average = AdapterAverage([unet, text_encoder], 0.9)

    def step() -> list[list[torch.Tensor]]:
        """Move what is trained; the averages then."""
        for parameter in (p for own in trained for p in own if p.requires_grad):
            parameter.data += 1
        average.step()
        with average.applied():
            return [[p.detach().clone() for p in own] for own in trained]

    step()
    unet_then, frozen = step()
    text_encoder.requires_grad_(False)
    for parameter, value in zip(trained[1], frozen, strict=True):
        assert not torch.equal(parameter, value)
    unet_now, still = step()
    assert all(map(torch.equal, still, frozen))
    assert not any(map(torch.equal, unet_now, unet_then))


def test_the_parameters_come_back_after_an_error():
    unet = build_unet()
    unet.requires_grad_(False)
    add_lora(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    average = AdapterAverage([unet], 0.9)
    start = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.data += 1
    moved = [p.detach().clone() for p in trained]
    with pytest.raises(RuntimeError, match="out of memory"), average.applied():
        assert all(map(torch.equal, trained, start))
        raise RuntimeError("out of memory")
    assert all(map(torch.equal, trained, moved))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_other_decays_are_refused(config, decay):
    with pytest.raises(Exception, match=rf"--ema_decay {decay}: must be in \[0, 1\)"):
        dataclasses.replace(config, ema_decay=decay)
