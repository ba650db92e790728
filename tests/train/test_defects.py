"""The defects of diffusers' train_dreambooth_lora_sdxl.py, one by one: none of them is here.

The table below says where each is tested: in this file, or in another one that has more about the same part.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.data import latents as data_latents
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.output.names import KOHYA_NAME, SUMMARY
from flatlora_diffusion.sdxl import encoding
from flatlora_diffusion.sdxl.loss import diffusion_losses, min_snr_weights
from flatlora_diffusion.train import learner, saving, validation
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.learner import Learner
from tests.tiny import assert_equal, run

TESTS = Path(__file__).parents[1]

TABLE = {
    "1. In bf16 the LoRA is bf16 too, and most updates are lost": [
        "train/test_defects.py::test_1_small_updates_move_a_in_bf16",
        "train/test_train.py::test_lora_parameters_are_float32_whatever_the_base_is",
    ],
    "2. Two opinions on the precision, accelerate's and the flag's": [
        "train/test_defects.py::test_2_precision_is_decided_once",
    ],
    "3. Wrong names and no alpha in kohya's format": [
        "adapter/test_kohya.py::test_of_every_layer_of_sdxl_are_those_that_diffusers_reads_from_checkpoints",
        "adapter/test_kohya.py::test_gives_the_update_that_peft_gives",
        "sdxl/test_loss.py::test_the_kohya_file_draws_the_same",
    ],
    "4. Prior preservation pairs prompts with other images, and has 2N min-SNR weights for N losses": [
        "train/test_class_images.py::test_loss_is_that_of_the_instances_plus_the_weighted_loss_of_the_class",
        "train/test_defects.py::test_4_min_snr_weighs_each_sample_of_both_halves",
    ],
    "5. Class images have the size and crop of the training image": [
        "train/test_class_images.py::test_class_images_keep_their_own_size_and_crop_and_have_other_noise",
    ],
    "6. A text encoder's learning rate of 0 is 1e-4, and switches cannot be turned off": [
        "train/test_defects.py::test_6_a_learning_rate_of_0_is_0",
        "config/test_settings.py::test_switches_that_are_on_by_default_can_be_turned_off",
    ],
    "7. Validation in training mode, and in fp16 where the run is bf16": [
        "train/test_defects.py::test_7_validation_is_drawn_in_eval_and_in_the_precision_of_the_run",
        "train/test_train.py::test_validation_pictures_are_drawn_without_noise_and_reported",
    ],
    "8. All token embeddings gather gradients": [
        "train/test_defects.py::test_8_nothing_but_the_adapter_gathers_gradients",
    ],
    "9. The VAE and the text encoders run in every step; crops and flips are drawn once": [
        "train/test_defects.py::test_9_images_and_captions_are_encoded_once",
        "data/test_images.py::test_every_variant_is_shown",
    ],
    "10. The end casts the UNet to float32 and loads a pipeline before it saves": [
        "train/test_defects.py::test_10_the_adapter_is_saved_before_anything_else",
    ],
    "11. Resuming: no position in the data, only the path's last part, the old checkpoint removed first, "
    "a step more after a finished run": [
        "train/test_resume.py::test_twenty_kills_and_resumes_end_in_the_same_file",
        "output/test_checkpoint.py::test_a_path_is_not_taken_for_the_checkpoint_of_that_name_in_the_output_folder",
        "output/test_checkpoint.py::test_killed_at_any_moment_there_is_a_sound_checkpoint",
        "train/test_defects.py::test_11_a_finished_run_trains_no_step_more",
    ],
    "12. Every file is opened as an image, and transparency is black": [
        "data/test_images.py::test_junk_is_passed_over",
        "data/test_images.py::test_transparency_is_composited_over_the_background",
    ],
    "13. No test of resuming, prior preservation, min-SNR, bf16, DoRA, kohya's format or bad input": [
        "train/test_resume.py",
        "train/test_class_images.py",
        "sdxl/test_loss.py::test_min_snr_counts_an_error_of_the_image_min_snr_gamma_times",
        "sdxl/test_loss.py::test_other_adapters_load_as_they_were_trained",
        "adapter/test_kohya.py",
        "commands/test_bad_input.py",
    ],
}


@pytest.mark.parametrize("defect", TABLE)
def test_the_table_names_tests_that_exist(defect):
    for place in TABLE[defect]:
        file, _, test = place.partition("::")
        text = (TESTS / file).read_text()
        assert re.search(rf"^ *def {test or 'test_'}", text, re.MULTILINE), place


@pytest.mark.slow
def test_1_small_updates_move_a_in_bf16(config, tmp_path):
    config = dataclasses.replace(config, mixed_precision="bf16", learning_rate=1e-4, max_train_steps=3)
    start = run(config, learning_rate=0.0, output_dir=str(tmp_path / "start"))
    end = run(config)
    moved, moved_in_bf16, count = 0, 0, 0
    for name, before in start.items():
        if "lora.down" in name:
            moved += (end[name] != before).sum().item()
            update = (end[name] - before).bfloat16()
            moved_in_bf16 += (before.bfloat16() + update != before.bfloat16()).sum().item()
            count += before.numel()
    assert moved > 0.99 * count
    assert moved_in_bf16 < 0.5 * count, "the twin: this is what would be lost"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher_says", "flag", "expected"),
    [("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", "bf16", "bf16"), ("no", None, "no")],
)
def test_2_precision_is_decided_once(config, monkeypatch, launcher_says, flag, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher_says)  # as `accelerate launch` does
    seen = []
    original = Learner.loss

    def look(self, micro_step):
        def inside(module, arguments, output):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

        unet = self.base.unet
        with unet.conv_in.register_forward_hook(inside):
            loss = original(self, micro_step)
        seen.append(
            (self.accelerator.mixed_precision, unet.dtype, self.prompts.embed(["a icon"]).tokens.dtype)
        )
        return loss

    monkeypatch.setattr(Learner, "loss", look)
    run(config, mixed_precision=flag, max_train_steps=1)
    dtype = torch.bfloat16 if expected == "bf16" else torch.float32
    (autocasts, autocast_dtype), told = seen
    assert told == (expected, dtype, dtype)
    assert autocasts == (expected == "bf16")
    assert not autocasts or autocast_dtype == dtype


@pytest.mark.slow
def test_4_min_snr_weighs_each_sample_of_both_halves(config, tmp_path, monkeypatch):
    config = dataclasses.replace(
        config,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a picture",
        num_class_images=1,
        prior_loss_weight=0.7,
        train_batch_size=3,
        max_train_steps=2,
        snr_gamma=0.5,
        flat_sigma=0.0,
    )
    Path(config.class_data_dir).mkdir()
    Image.new("RGB", (16, 16), "olive").save(Path(config.class_data_dir, "0.png"))
    original, compared = Learner.loss, []

    def compare(self, micro_step):
        loss = original(self, micro_step)
        parts = []
        for latents in (self.latents, self.class_latents):
            batch = latents.batch(range(3 * micro_step, 3 * micro_step + 3))
            weights = min_snr_weights(self.base.noise_scheduler, batch.timesteps, 0.5)
            with torch.no_grad():
                plain = [self._losses(single(batch, index)).item() for index in range(3)]
            parts.append(sum(w * e for w, e in zip(weights.tolist(), plain, strict=True)) / 3)
        compared.append((loss.item(), parts[0] + 0.7 * parts[1]))
        return loss

    def single(batch, index):
        values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        chosen = {name: value[index : index + 1] for name, value in values.items() if value is not None}
        return dataclasses.replace(batch, **chosen)

    unweighted = diffusion_losses
    weighing = []

    def losses(*arguments):
        size = len(arguments[2])
        weighing.append(size)
        return unweighted(*arguments) if size > 1 else unweighted(*arguments[:7], None, *arguments[8:])

    monkeypatch.setattr(learner, "diffusion_losses", losses)
    monkeypatch.setattr(Learner, "loss", compare)
    run(config)
    assert weighing.count(6) == len(compared) == 2
    for actual, expected in compared:
        assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_6_a_learning_rate_of_0_is_0(config, tmp_path):
    config = dataclasses.replace(config, train_text_encoder=True, max_train_steps=2, train_batch_size=1)
    still = run(config, text_encoder_lr=0.0)
    moving = run(config, text_encoder_lr=1e-4, output_dir=str(tmp_path / "moving"))
    start = run(config, text_encoder_lr=0.0, learning_rate=0.0, output_dir=str(tmp_path / "start"))
    parts = {name.split(".")[0] for name in start}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    for part in parts:
        mine = [name for name in start if name.startswith(f"{part}.")]
        assert all(torch.equal(still[name], start[name]) for name in mine) == (part != "unet")
        assert not all(torch.equal(moving[name], start[name]) for name in mine)


@pytest.mark.slow
def test_7_validation_is_drawn_in_eval_and_in_the_precision_of_the_run(config, monkeypatch):
    original, seen = validation.draw, []

    def look(pipeline, *arguments, **settings):
        def inside(module, *ignored):
            autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            seen.append((module.training, autocast, torch.is_grad_enabled()))

        with pipeline.unet.register_forward_pre_hook(inside):
            picture = original(pipeline, *arguments, **settings)
        seen.append(np.asarray(picture).std())
        return picture

    monkeypatch.setattr(validation, "draw", look)
    run(
        config,
        mixed_precision="bf16",
        max_train_steps=2,
        lora_dropout=0.5,
        validation_prompt=("a icon",),
        num_validation_images=1,
        validation_inference_steps=2,
    )
    *passes, contrast = seen
    assert len(passes) == 2
    assert all(settings in ((False, torch.bfloat16, False), (False, None, False)) for settings in passes)
    assert contrast > 1, "black, or grey"


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True])
def test_8_nothing_but_the_adapter_gathers_gradients(config, text_encoders):
    gradients = {}

    class Look(Callback):
        def backward(self, run, compute):
            loss = compute()
            gradients.update(
                (f"{part}.{name}", parameter.grad)
                for part, model in run.models.items()
                for name, parameter in model.named_parameters()
            )
            return loss

    changes = {"train_text_encoder": text_encoders, "max_train_steps": 1, "flat_sigma": 0.0}
    run(config, **changes, callbacks=[Look()])
    assert any("token_embedding" in name for name in gradients) == text_encoders
    for name, gradient in gradients.items():
        assert gradient is None or ".lora_" in name, name
    trained = [name for name, gradient in gradients.items() if gradient is not None]
    # A and B; of the first text encoder SDXL takes what the last but one of its three layers gives.
    assert len(trained) == 2 * (8 + (2 + 3) * 4 * text_encoders)


@pytest.mark.slow
def test_9_images_and_captions_are_encoded_once(config, monkeypatch):
    calls = []

    def count(name, *modules):
        original = getattr(encoding, name)

        def encode(*arguments):
            calls.append(name)
            return original(*arguments)

        for module in modules:
            monkeypatch.setattr(module, name, encode)

    original = Learner.loss

    def look(self, micro_step):
        assert self.base.vae is None and self.base.text_encoders == (), "they have left memory"
        calls.append("step")
        return original(self, micro_step)

    count("encode_images", learner)
    count("encode_prompts", learner, data_latents)
    monkeypatch.setattr(Learner, "loss", look)
    run(config, random_flip=True, max_train_steps=3)
    samples = find_samples(Path(config.instance_data_dir), config.instance_prompt)
    assert calls.count("step") == 3, "the first of a second epoch too"
    assert "step" not in calls[: calls.index("step")] and set(calls[calls.index("step") :]) == {"step"}
    assert calls.count("encode_images") == 2 * len(samples), "each as it is and mirrored"
    assert calls.count("encode_prompts") == len({sample.caption for sample in samples} | {""})


@pytest.mark.slow
def test_10_the_adapter_is_saved_before_anything_else(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, mixed_precision="bf16", max_train_steps=2)
    whole = run(config, output_dir=str(tmp_path / "whole"))

    def summary(*arguments):
        raise MemoryError

    models = {}

    class Keep(Callback):
        def on_train_end(self, run):
            models.update(run.models)

    monkeypatch.setattr(saving, "summary", summary)
    with pytest.raises(MemoryError):
        run(config, callbacks=[Keep()])
    assert_equal(load_file(Path(config.output_dir, WEIGHTS_NAME)), whole)
    assert models["unet"].dtype == torch.bfloat16, "nothing was cast"


@pytest.mark.slow
def test_11_a_finished_run_trains_no_step_more(config):
    config = dataclasses.replace(config, max_train_steps=2, checkpointing_steps=1)
    whole = run(config)
    path = Path(config.output_dir, WEIGHTS_NAME)
    content = path.read_bytes()
    path.unlink()  # so that it goes on from its last checkpoint
    steps = []

    class Count(Callback):
        def on_train_begin(self, run):
            steps.append(run.step)

        def backward(self, run, compute):
            steps.append("one more")
            return compute()

    resumed = run(config, resume_from_checkpoint="latest", callbacks=[Count()])
    assert_equal(resumed, whole)
    assert steps == [2] and path.read_bytes() == content


@pytest.mark.slow
def test_10_a_kill_just_after_the_adapter_was_saved_costs_no_other_file(config, monkeypatch):
    config = dataclasses.replace(config, max_train_steps=2, checkpointing_steps=1, output_kohya_format=True)

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "convert", kill)
        run(config)
    output = Path(config.output_dir)
    saved = (output / WEIGHTS_NAME).read_bytes()
    assert not (output / KOHYA_NAME).exists()
    run(config, resume_from_checkpoint="latest")
    assert (output / KOHYA_NAME).is_file() and (output / SUMMARY).is_file()
    assert (output / WEIGHTS_NAME).read_bytes() == saved
