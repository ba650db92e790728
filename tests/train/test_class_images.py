"""Prior preservation: the class images, their prompts, sizes and weight."""

import dataclasses
from functools import partial

import pytest
import torch
from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.sdxl.loss import diffusion_losses
from flatlora_diffusion.train import class_images as train_class_images
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.class_images import class_samples
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.loop import Run


@pytest.fixture
def config(config, tmp_path) -> TrainConfig:
    return dataclasses.replace(
        config,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a picture",
        num_class_images=3,
        prior_loss_weight=0.7,
        train_batch_size=3,
        max_train_steps=2,
    )


@pytest.fixture
def drawn_in_two_steps(monkeypatch):
    """In place of fifty."""
    monkeypatch.setattr(train_class_images, "Drawing", partial(Drawing, steps=2))


@pytest.fixture
def class_images(config):
    folder = images.Path(config.class_data_dir)
    folder.mkdir()
    for index, size in enumerate([(16, 16), (40, 20), (24, 48)]):
        Image.new("RGB", size, (index * 80, 90, 30)).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_loss_is_that_of_the_instances_plus_the_weighted_loss_of_the_class(config, class_images, monkeypatch):
    original, compared = Learner.loss, []

    def compare(self, micro_step):
        loss = original(self, micro_step)
        parts = []
        for latents in (self.latents, self.class_latents):
            batch = latents.batch(range(micro_step * 3, micro_step * 3 + 3))
            prompt = {"a icon"} if latents is self.class_latents else {"a picture"}
            assert not prompt & set(batch.captions)
            embeds = self.prompts.embed(batch.captions)
            with torch.no_grad():
                losses = diffusion_losses(
                    self.base.unet,
                    self.base.noise_scheduler,
                    batch.latents,
                    batch.noise,
                    batch.timesteps,
                    embeds,
                    batch.time_ids,
                )
            parts.append(losses.mean())
        compared.append((loss.item(), (parts[0] + 0.7 * parts[1]).item()))
        return loss

    monkeypatch.setattr(Learner, "loss", compare)
    train(config)
    assert len(compared) == 2
    for actual, expected in compared:
        assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_class_images_keep_their_own_size_and_crop_and_have_other_noise(config, class_images, monkeypatch):
    seen = []
    original = Learner.loss

    def look(self, micro_step):
        seen.append((self.latents.batch(range(30)), self.class_latents.batch(range(30))))
        return original(self, micro_step)

    monkeypatch.setattr(Learner, "loss", look)
    train(dataclasses.replace(config, max_train_steps=1))
    instance, of_class = seen[0]
    assert {tuple(ids[:2].tolist()) for ids in of_class.time_ids} == {(16, 16), (20, 40), (48, 24)}
    assert of_class.time_ids[:, 2:4].unique(dim=0).shape[0] > 2
    assert set(of_class.captions) == {"a picture"}
    assert not torch.equal(instance.noise, of_class.noise)
    assert not torch.equal(instance.timesteps, of_class.timesteps)


@pytest.mark.slow
def test_missing_class_images_are_drawn_and_each_is_a_function_of_its_number(config, drawn_in_two_steps):
    folder = images.Path(config.class_data_dir)
    samples = class_samples(dataclasses.replace(config, sample_batch_size=1))
    assert [sample.path.name for sample in samples] == [f"class-{n:05d}.png" for n in range(3)]
    assert {sample.caption for sample in samples} == {"a picture"}
    pictures = [sample.path.read_bytes() for sample in samples]
    assert len(set(pictures)) == 3
    for missing, batch_size in ((1, 1), (3, 2)):
        for sample in samples[:missing]:
            sample.path.unlink(missing_ok=True)
        again = class_samples(dataclasses.replace(config, sample_batch_size=batch_size))
        assert [sample.path.read_bytes() for sample in again] == pictures
    assert len(list(folder.iterdir())) == 3


@pytest.mark.slow
def test_given_class_images_count(config, class_images, drawn_in_two_steps):
    assert len(class_samples(config)) == 3
    more = class_samples(dataclasses.replace(config, num_class_images=5))
    assert [sample.path.name for sample in more] == [
        *("0.png", "1.png", "2.png", "class-00000.png", "class-00001.png")
    ]
    assert len(class_samples(dataclasses.replace(config, num_class_images=2))) == 2


def test_an_epoch_passes_over_the_larger_of_both_sets(config, class_images):
    samples = find_samples(images.Path(config.instance_data_dir), "a icon")
    classes = [*class_samples(config)] * 10
    alone = Run(dataclasses.replace(config, max_train_steps=None, train_batch_size=1), samples)
    assert alone.steps_an_epoch == len(samples)
    repeated = dataclasses.replace(config, max_train_steps=None, train_batch_size=1, repeats=4)
    assert Run(repeated, samples).steps_an_epoch == 4 * len(samples)
    assert Run(repeated, samples, classes).steps_an_epoch == max(4 * len(samples), 30)


@pytest.mark.parametrize("name", ["class_data_dir", "class_prompt"])
def test_what_is_missing_is_named(config, name):
    with pytest.raises(UserError, match=f"--with_prior_preservation needs --{name}"):
        dataclasses.replace(config, **{name: None})


def test_a_file_in_place_of_the_class_folder_is_refused(config):
    images.Path(config.class_data_dir).write_text("not a folder")
    with pytest.raises(UserError, match=r"--class_data_dir .*class: not a folder"):
        train(config)
    assert not images.Path(config.output_dir).exists()


@pytest.mark.parametrize(("given", "side"), [(None, 16), (24, 24)], ids=["base", "given"])
def test_class_images_are_drawn_at_the_base_s_size_unless_told_otherwise(config, monkeypatch, given, side):
    drawn = []

    def draw(pipeline, adapter, pictures, drawing):
        drawn.append((drawing.width, drawing.height, drawing.steps, drawing.sampler))
        return [Image.new("RGB", (drawing.width, drawing.height)) for _ in pictures]

    monkeypatch.setattr(train_class_images, "draw_batch", draw)
    class_samples(dataclasses.replace(config, resolution=32, class_resolution=given))
    assert drawn == [(side, side, 50, "default")]


def test_out_of_memory_keeps_what_was_drawn(config, monkeypatch):
    def draw(pipeline, adapter, pictures, drawing):
        if any(images.Path(config.class_data_dir).iterdir()):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return [Image.new("RGB", (16, 16))] * len(pictures)

    monkeypatch.setattr(train_class_images, "draw_batch", draw)
    config = dataclasses.replace(config, sample_batch_size=1)
    told = "^out of memory while class images were drawn into .*: those that are there stay; lower --sample"
    with pytest.raises(UserError, match=told):
        class_samples(config)
    assert len(list(images.Path(config.class_data_dir).iterdir())) == 1
