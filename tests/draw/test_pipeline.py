import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw import pipeline as draw_pipeline
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import (
    Drawing,
    conditions_of,
    draw_batch,
    draw_with,
    load_pipeline,
    native_side,
    sketches,
)
from tests.tiny import global_rng_state

DRAWING = Drawing(16, 16, steps=2, guidance=3.0)


@pytest.fixture
def pipeline(base_path):
    return load_pipeline(str(base_path))


@pytest.mark.slow
def test_columns_differ_and_switching_back_gives_the_bits_of_the_base(pipeline, adapters):
    base = draw_with(pipeline, None, "a icon", 3, DRAWING)
    for label, path in adapters.items():
        load_adapter(pipeline, label, path)
    one, other = (draw_with(pipeline, label, "a icon", 3, DRAWING) for label in adapters)
    assert len({picture.tobytes() for picture in (base, one, other)}) == 3
    assert draw_with(pipeline, None, "a icon", 3, DRAWING).tobytes() == base.tobytes()
    assert draw_with(pipeline, "LoRA", "a icon", 3, DRAWING).tobytes() == one.tobytes()


def with_dropout(file: Path, share: float) -> None:
    """Let an adapter's file ask for dropout, as those of other trainers do."""
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["unet.lora_dropout"] == 0.0
    metadata["lora_adapter_metadata"] = json.dumps(settings | {"unet.lora_dropout": share})
    save_file(load_file(file), file, metadata)


@pytest.mark.slow
def test_dropout_of_the_training_is_not_drawn_with(pipeline, adapters):
    load_adapter(pipeline, "plain", adapters["LoRA"])
    with_dropout(adapters["LoRA"], 0.5)
    load_adapter(pipeline, "dropped", adapters["LoRA"])
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in pipeline.unet.modules())
    rng = global_rng_state()
    plain, dropped = (draw_with(pipeline, name, "a icon", 3, DRAWING) for name in ("plain", "dropped"))
    assert dropped.tobytes() == plain.tobytes()
    assert global_rng_state() == rng


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_a_base_that_does_not_tell_its_size(pipeline, size):
    assert native_side(pipeline) == 8 * pipeline.vae_scale_factor
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(UserError, match=r"sample_size is .*; set the latents' side"):
        native_side(pipeline)


def test_every_method_starts_from_the_noise_of_the_seed(pipeline, adapters, monkeypatch):
    seen = []
    original = type(pipeline).prepare_latents

    def spy(self, *arguments, **settings):
        seen.append(original(self, *arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(type(pipeline), "prepare_latents", spy)
    load_adapter(pipeline, "lora", adapters["LoRA"])
    for adapter, seed in ((None, 7), ("lora", 7), (None, 8)):
        draw_with(pipeline, adapter, "a icon", seed, DRAWING)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


PICTURES = [("a icon", 5), ("a red icon with a much longer prompt", 5), ("a icon", 6), ("", 7), ("a icon", 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "drawing", [DRAWING, Drawing(16, 24, 3, 1.0), Drawing(16, 16, 3, 4.0, "blue", "Euler a")]
)
@pytest.mark.parametrize("adapter", [None, "LoRA"])
def test_pictures_of_a_batch_have_the_bits_of_lone_ones(pipeline, adapters, drawing, adapter):
    load_adapter(pipeline, "LoRA", adapters["LoRA"])
    alone = [draw_with(pipeline, adapter, prompt, seed, drawing).tobytes() for prompt, seed in PICTURES]
    assert len(set(alone)) == len(PICTURES)
    for size in (2, 3, 5):
        batch = [
            picture.tobytes()
            for start in range(0, len(PICTURES), size)
            for picture in draw_batch(pipeline, adapter, PICTURES[start : start + size], drawing)
        ]
        assert batch == alone


@pytest.mark.parametrize("negative", [None, "blue"])
def test_a_picture_is_the_one_of_the_plain_pipeline(pipeline, adapters, negative):
    load_adapter(pipeline, "LoRA", adapters["LoRA"])
    ours = draw_with(pipeline, "LoRA", "a icon", 3, Drawing(16, 24, 3, 4.0, negative))
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 16, "height": 24}
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline("a icon", negative_prompt=negative, generator=generator, **settings).images[0]
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.slow
def test_the_scale_of_an_adapter(pipeline, adapters):
    base = draw_with(pipeline, None, "a icon", 3, DRAWING)
    path = adapters["LoRA"]
    load_adapter(pipeline, "LoRA", path)
    assert draw_with(pipeline, "LoRA", "a icon", 3, DRAWING, scale=0.0).tobytes() == base.tobytes()
    half = draw_with(pipeline, "LoRA", "a icon", 3, DRAWING, scale=0.5)
    tensors = load_file(path)
    tensors |= {name: tensor / 2 for name, tensor in tensors.items() if "lora_B" in name or "lora.up" in name}
    halved = path.with_name("halved.safetensors")
    with safe_open(path, framework="pt") as file:
        save_file(tensors, halved, metadata=file.metadata())
    load_adapter(pipeline, "halved", halved)
    assert draw_with(pipeline, "halved", "a icon", 3, DRAWING).tobytes() == half.tobytes()
    full = draw_with(pipeline, "LoRA", "a icon", 3, DRAWING)
    assert full.tobytes() != half.tobytes() != base.tobytes()


def test_every_step_tells_the_picture_that_is_expected(pipeline):
    told = []
    drawing = Drawing(16, 24, 4, 3.0)
    pictures = draw_batch(pipeline, None, PICTURES[:3], drawing, on_step=lambda *step: told.append(step))
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert all(latents.shape == (3, 4, 12, 8) for _, latents in told)
    # After the last step nothing is left to be removed; latents are 2 pixels wide here, 8 in SDXL.
    for sketch, picture in zip(sketches(pipeline, told[-1][1]), pictures, strict=True):
        assert np.abs(np.asarray(sketch, float) - np.asarray(picture, float)).max() <= 1
    assert sketches(pipeline, told[0][1], longest=6)[0].size == (8, 12)


@pytest.mark.parametrize("alone", [False, True])
def test_where_memory_runs_out_text_encoders_make_room(pipeline, monkeypatch, alone):
    """Also for the trainer, which draws one picture of embeddings."""
    ((prompt, seed),) = pictures = PICTURES[:1]
    conditions = conditions_of(pipeline, prompt, None, DRAWING)

    def drawn():
        if alone:
            return draw_pipeline.draw(pipeline, seed, DRAWING, prompt, **conditions)
        return draw_batch(pipeline, None, pictures, DRAWING)[0]

    expected = drawn()
    moved, calls, denoise = [], [], draw_pipeline._denoise
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        monkeypatch.setattr(encoder, "to", moved.append)

    def too_large_once(*arguments, **conditions):
        calls.append(len(moved))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(*arguments, **conditions)

    monkeypatch.setattr(draw_pipeline, "_denoise", too_large_once)
    assert drawn().tobytes() == expected.tobytes()
    assert calls == [0, 2] and moved == ["cpu", "cpu", torch.device("cpu"), torch.device("cpu")]
    if alone:  # the trainer's text encoders may be gone
        monkeypatch.setattr(pipeline, "text_encoder", None)
        monkeypatch.setattr(pipeline, "text_encoder_2", None)
        calls.clear()
        assert drawn().tobytes() == expected.tobytes()


def test_an_exception_in_a_step_ends_the_drawing_and_nothing_else(pipeline):
    before = draw_batch(pipeline, None, PICTURES, DRAWING)
    scheduler = pipeline.scheduler

    def stop(step, latents):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        draw_batch(pipeline, None, PICTURES, DRAWING, on_step=stop)
    assert pipeline.scheduler is scheduler
    after = draw_batch(pipeline, None, PICTURES, DRAWING)
    assert [picture.tobytes() for picture in before] == [picture.tobytes() for picture in after]


def test_drawing_leaves_the_global_rng_alone(pipeline):
    state = global_rng_state()
    draw_batch(pipeline, None, PICTURES, Drawing(16, 16, 2, 3.0, sampler="Euler a"))
    assert global_rng_state() == state


def test_bad_adapters_are_named(pipeline, adapters, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a sound safetensors file"):
        load_adapter(pipeline, "x", tmp_path / "nowhere")
    content = adapters["LoRA"].read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors: not a sound safetensors file"):
        load_adapter(pipeline, "x", cut)
