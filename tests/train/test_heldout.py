"""The held-out loss: fixed samples, no noise on the weights, kept over a resume."""

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import Framing, find_samples, variants
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import encode_images, encode_prompts
from flatlora_diffusion.sdxl.loss import diffusion_losses
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.learner import Learner
from tests.tiny import assert_equal, run, stop_after


@pytest.fixture
def config(config, tmp_path) -> TrainConfig:
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for index, colour in enumerate(("red", "green", "navy")):
        Image.new("RGB", (20, 20 + 8 * index), colour).save(heldout / f"{index}.png")
    return dataclasses.replace(
        config,
        heldout_data_dir=str(heldout),
        heldout_steps=2,
        max_train_steps=3,
        learning_rate=1e-2,
        flat_sigma=5.0,
        flat_schedule="constant",
    )


def losses_of(config, **changes) -> dict[str, float]:
    config = dataclasses.replace(config, **changes)
    train(config)
    return json.loads((images.Path(config.output_dir) / "summary.json").read_text())["heldout_losses"]


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True], ids=["unet", "with text encoders"])
def test_it_is_the_loss_of_the_saved_adapter_without_noise(config, base_path, text_encoders):
    measured = losses_of(config, train_text_encoder=text_encoders, text_encoder_lr=1e-2)
    assert list(measured) == ["2", "3"]
    base = load_base(str(base_path))
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
    pipeline.load_lora_weights(config.output_dir)
    total = []
    samples = find_samples(images.Path(config.heldout_data_dir), "a icon")
    for index, sample in enumerate(samples):
        (shown,) = variants(sample, Framing(resolution=16, center_crop=True), seed=0)
        latents = encode_images(base.vae, shown.pixels[None]).mean
        noise = torch.randn(8, *latents.shape[1:], generator=keyed_generator(0, "fixed", index))
        embeds = encode_prompts(
            base.tokenizers, (pipeline.text_encoder, pipeline.text_encoder_2), [sample.caption]
        )
        time_ids = torch.tensor([*shown.original_size, *shown.crop_top_left, 16, 16])
        for k in range(8):
            with torch.no_grad():
                loss = diffusion_losses(
                    pipeline.unet.eval(),
                    base.noise_scheduler,
                    latents,
                    noise[k : k + 1],
                    torch.tensor([round((k + 0.5) * 125)]),
                    embeds,
                    time_ids[None],
                )
            total.append(loss.item())
    assert measured["3"] == pytest.approx(sum(total) / len(total), rel=1e-4)


@pytest.mark.slow
def test_measuring_changes_nothing_and_does_not_depend_on_the_seed(config, tmp_path):
    measured = run(config)
    plain = run(config, heldout_data_dir=None, output_dir=str(tmp_path / "plain"))
    assert_equal(measured, plain)
    frozen = {
        json.dumps(losses_of(config, learning_rate=0.0, seed=seed, output_dir=str(tmp_path / f"seed {seed}")))
        for seed in (0, 1)
    }
    assert len(frozen) == 1


@pytest.mark.slow
def test_held_out_images_stay_on_white_where_backgrounds_are_random(config, tmp_path):
    image = Image.linear_gradient("L").resize((20, 20))
    Image.merge("RGBA", [image] * 4).save(images.Path(config.heldout_data_dir) / "0.png")
    frozen = dataclasses.replace(config, learning_rate=0.0, max_train_steps=1)
    losses = {
        background: losses_of(frozen, background=background, output_dir=str(tmp_path / background))
        for background in ("white", "random", "black")
    }
    assert losses["random"] == losses["white"] != losses["black"]


@pytest.mark.slow
def test_a_resumed_run_has_the_whole_history(config, tmp_path):
    whole = losses_of(config)

    parts = str(tmp_path / "parts")
    stop_after(config, 2, output_dir=parts)
    assert losses_of(config, output_dir=parts, resume_from_checkpoint="latest") == whole


def test_a_missing_folder_is_named_by_its_flag(config):
    with pytest.raises(UserError, match=r"--heldout_data_dir nowhere: no such folder"):
        train(dataclasses.replace(config, heldout_data_dir="nowhere"))
    assert not images.Path(config.output_dir).exists()


@pytest.mark.slow
def test_out_of_memory_costs_that_loss_alone_and_in_a_step_says_what_to_do(config, tmp_path, monkeypatch):
    measure, calls = Learner.heldout_loss, []

    def too_large_once(learner):
        calls.append(learner)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(learner)

    monkeypatch.setattr(Learner, "heldout_loss", too_large_once)
    config = dataclasses.replace(config, heldout_steps=1, max_train_steps=2)
    run(config)
    summary = json.loads(images.Path(config.output_dir, "summary.json").read_text())
    assert summary["heldout_losses"].keys() == {"2"}

    def too_large(learner, micro_step):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(Learner, "loss", too_large)
    told = (
        "^out of memory at step 1: try --mixed_precision bf16, --gradient_checkpointing, --train_batch_size "
        "1 --gradient_accumulation_steps 2, --quantize_base 4bit, a smaller --resolution, in this order; "
    )
    with pytest.raises(UserError, match=told):
        run(config, output_dir=str(tmp_path / "other"))
