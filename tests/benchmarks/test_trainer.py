"""The benchmark of the trainer: that what it measures against is the same training, and that it measures."""

import dataclasses
import json
import multiprocessing

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from benchmarks import arms, bases, reference, trainer
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.data.latents import Batch, LatentCache
from flatlora_diffusion.output.names import SUMMARY
from flatlora_diffusion.train import arms as train_arms
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback

STEPS = 3


@pytest.fixture
def square_icons(icons):
    """Opaque icons of several sizes: how transparency and crops are treated is each trainer's own."""
    for index, path in enumerate(sorted(icons.glob("*.png"))):
        Image.open(path).convert("RGB").resize((24 + 8 * index,) * 2).save(path)
    return icons


def adapter_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("captions", [True, False], ids=["captions", "one prompt"])
def test_the_reference_takes_the_same_steps_as_the_trainer(config, square_icons, monkeypatch, captions):
    config = dataclasses.replace(
        config,
        flat_sigma=0.0,
        max_train_steps=STEPS,
        max_grad_norm=0.05,
        adam_epsilon=1e-3,  # or rounding would decide the direction in which a tiny gradient moves a weight
    )
    samples = find_samples(square_icons, config.instance_prompt)
    if not captions:
        samples = [dataclasses.replace(sample, caption=config.instance_prompt) for sample in samples]
    seen, drawn, start, trained = [], [], {}, {}
    forward, add_noise = UNet2DConditionModel.forward, DDPMScheduler.add_noise

    def watch_forward(self, *inputs, added_cond_kwargs, return_dict):
        if not start:
            trained.update(adapter_of(self))
            start.update({name: p.detach().clone() for name, p in trained.items()})
        seen.append([*inputs, added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]])
        return forward(self, *inputs, added_cond_kwargs=added_cond_kwargs, return_dict=return_dict)

    def watch_add_noise(self, latents, noise, timesteps):
        drawn.append((latents, noise, timesteps))
        return add_noise(self, latents, noise, timesteps)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watch_forward)
    monkeypatch.setattr(DDPMScheduler, "add_noise", watch_add_noise)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self: self.mode())
    losses = []
    with torch.random.fork_rng():
        reference.train(
            config, [(sample.path, sample.caption) for sample in samples], losses.append, captions=captions
        )
    assert len(losses) == len(seen) == STEPS
    expected = seen.copy()
    seen.clear()

    shown, adapter, told = drawn.copy(), {}, []

    def batch(self, positions):
        """What the script has drawn, in the place of the trainer's own draws."""
        latents, noise, timesteps = shown[positions[0] // config.train_batch_size]
        images = list(self.fixed_batches([0]))
        distances = (latents[:, None] - torch.cat([image.latents for image in images])).abs()
        distances = distances.amax(dim=(2, 3, 4))
        assert distances.amin(dim=1).max() < 1e-5, "the latents are those of the training images"
        members = distances.argmin(dim=1).tolist()
        time_ids = torch.cat([images[index].time_ids for index in members])
        return Batch([samples[index].caption for index in members], latents, noise, timesteps, time_ids)

    class Watch(Callback):
        def on_train_begin(self, run):
            adapter.update(adapter_of(run.models["unet"]))
            for name, parameter in adapter.items():
                parameter.data.copy_(start[name])

        def on_step_end(self, run):
            told.append(run.loss)

    monkeypatch.setattr(LatentCache, "batch", batch)
    if not captions:
        monkeypatch.setattr(train_arms, "find_samples", lambda *_, **__: samples)
    train(config, callbacks=[Watch()])
    assert told == pytest.approx(losses, rel=1e-5)
    for one, other in zip(seen, expected, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-5)
    for name, parameter in adapter.items():
        error = (parameter - trained[name]).norm() / trained[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
        assert not torch.equal(parameter, start[name])


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_the_small_sdxl_shares_its_arithmetic_as_sdxl_does():
    sdxl = {"vae": 0.2556, "text_encoders": 0.0058, "unet": 0.7385}  # step_flops(SDXL).shares(): takes long
    small = bases.step_flops(bases.MIDSIZE).shares()
    assert small == pytest.approx(sdxl, rel=0.1)


@pytest.mark.slow
def test_a_written_base_has_the_sizes_asked_for(tmp_path):
    narrow = {"block_out_channels": (32, 32, 64), "transformer_layers_per_block": 1, "attention_head_dim": 1}
    sizes = dataclasses.replace(
        bases.MIDSIZE,
        unet=bases.MIDSIZE.unet | narrow,
        text_encoder=bases.MIDSIZE.text_encoder | {"num_hidden_layers": 1},
        text_encoder_2=bases.MIDSIZE.text_encoder_2 | {"num_hidden_layers": 1},
        resolution=64,
    )
    bases.write_base(sizes, tmp_path / "base")
    written = bases.Sizes.of(tmp_path / "base", 64)
    assert written.resolution == sizes.resolution
    of_written, of_asked = (vars(bases.build(each, "meta")) for each in (written, sizes))
    for part, model in of_asked.items():
        asked = json.loads(json.dumps(getattr(sizes, part)))
        assert {name: getattr(written, part)[name] for name in asked} == asked
        assert shapes(of_written[part]) == shapes(model)


@pytest.mark.slow
def test_the_watched_trainer_is_the_trainer(config, tmp_path):
    train(config)
    expected = json.loads((images.Path(config.output_dir) / SUMMARY).read_text())["losses"]
    losses = []

    class Steps:
        def done(self):
            losses.append(None)

        def peak(self):
            losses.clear()

    config = dataclasses.replace(config, output_dir=str(tmp_path / "watched"))
    arms.train_here(config, Steps())
    watched = json.loads((tmp_path / "watched" / SUMMARY).read_text())["losses"]
    assert watched == expected
    assert len(losses) == len(expected) - 1  # the last step's end is not waited for


@pytest.mark.slow
def test_an_arm_in_its_process_steps_and_stops(config, tmp_path, monkeypatch):
    """A forked process saves the imports; the next test's is a new one, as in a benchmark."""
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked)
    config = dataclasses.replace(config, max_train_steps=10)
    process = arms.Process("Flat-LoRA", config, [], tmp_path / "log", tmp_path / "kept")
    seconds = [process.step() for _ in range(2)]
    assert all(0 < second < process.start_up for second in seconds)
    assert process.stop() > 50 * 2**20  # torch alone takes more
    assert not list(tmp_path.glob("run/*.safetensors"))
    assert len(list(tmp_path.glob("kept/encodings/*.safetensors"))) == 2, "latents, and embeddings"


@pytest.mark.slow
def test_a_failing_arm_says_why(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)'DoRA' failed.*KeyError: 'DoRA'"):
        arms.Process("DoRA", config, [], tmp_path / "log", tmp_path / "kept")


@pytest.mark.slow
def test_ratios_are_of_the_same_moment(monkeypatch, tmp_path):
    """Arms take turns, in an order that rotates: a slowdown of the machine leaves the ratios alone."""
    clock = {"turn": 0}
    cost = dict(zip(trainer.ARMS, (4.0, 3.0, 2.0, 2.2, 2.1), strict=True))
    order, settings, caches = [], {}, {}

    class Process:
        def __init__(self, name, config, samples, log, cache):
            self.name, self.start_up = name, 10 * cost[name]
            settings[name] = config
            caches.setdefault(name, []).append(cache)

        def step(self):
            order.append(self.name)
            slowdown = 1 + clock["turn"] // len(cost)
            clock["turn"] += 1
            return slowdown * cost[self.name]

        def stop(self):
            return int(cost[self.name] * 2**20)

        def kill(self):
            pass

    monkeypatch.setattr(trainer, "Process", Process)
    case = trainer.Case("a case", trainer.DEMO_BASE, 64, "no", False)
    result = trainer.measure(case, 2, 5, tmp_path / "runs")
    names = list(trainer.ARMS)
    assert order[:5] == names and order[5:10] == [*names[1:], names[0]]
    later = caches.pop("Flat-LoRA, later run")
    assert len(later) == 3 and len(set(later)) == 1, (
        "a run that fills the cache, then the two that are measured"
    )
    first = {cache for own in caches.values() for cache in own}
    assert len(first - {*later}) == 2 * len(caches), "the others find nothing"
    assert settings["Flat-LoRA"].flat_sigma == 0.1 and settings["LoRA"].flat_sigma == 0
    assert all(config.max_train_steps > 5 + 1 for config in settings.values())
    rows = {
        row.split(" | ")[0].strip("| "): row.split(" | ")[1:]
        for row in trainer.table(result).splitlines()
        if row.startswith("| ")
    }
    assert rows["LoRA"][1] == "0.500 (0.500-0.500)"
    assert rows["Flat-LoRA"][1] == "0.550 (0.550-0.550)"
    assert rows["LoRA"][2] == "20.0" and rows["LoRA"][4] == "2"
    # Ten steps at once to ten times the cost: the median is 5.5 times.
    assert float(rows["LoRA"][0]) == pytest.approx(5.5 * 2)
    assert rows["LoRA"][5].strip(" |") == f"{20 + 499 * 11}"
