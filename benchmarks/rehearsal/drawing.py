"""All that draws, on the demo base: validation, the page, grids, and the evaluation's losses and pictures.

The code is the real one, down to the files; models are real ones until they are moved to the card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.common import DEMO_BASE
from benchmarks.rehearsal.fake import without_a_driver
from benchmarks.rehearsal.known import numbers
from flatlora_diffusion.app import engine
from flatlora_diffusion.app.engine import Drawn, Job, Studio
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_batch, load_pipeline
from flatlora_diffusion.draw.shaken import Shake
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.evaluate import evaluation
from flatlora_diffusion.evaluate.likeness import Likeness
from flatlora_diffusion.evaluate.plan import Plan
from flatlora_diffusion.grid import draw as grid_draw
from flatlora_diffusion.grid.plan import Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.lora import add_lora
from flatlora_diffusion.train.validation import draw_validation

ASSETS = DEMO_BASE.parent
ADAPTER = ASSETS / "adapters" / "flat_lora"
PROMPTS = ("a red heart", "a key")
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@contextlib.contextmanager
def _on_card() -> Iterator[None]:
    # Fake tensors belong to the thread that made them, and transformers loads in others.
    alone = mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1")
    with alone, without_a_driver(), numbers():
        yield


def _pipeline(dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """The demo base on the card; to be called on it."""
    with unset_fake_temporarily():
        pipeline = load_pipeline(str(DEMO_BASE), dtype=dtype)
    return pipeline.to("cuda")


def rehearse_page(dtype: torch.dtype, samplers: Sequence[str]) -> str:
    """The page's engine: two pictures at once with their sketches, one of the base, then a shaken one."""
    with (
        _on_card(),
        # Other modules keep their threads.
        mock.patch.object(engine, "threading", SimpleNamespace(**(vars(threading) | {"Thread": _AtOnce}))),
        mock.patch.object(engine, "SECONDS_BETWEEN_STEPS", 0.0),
    ):
        studio = Studio(_pipeline(dtype), "demo", {"Flat-LoRA": ADAPTER})
        pictures = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        drawings = [Drawing(64, 96, 3, sampler=name) for name in samplers]
        jobs = [Job("Flat-LoRA", pictures, drawing) for drawing in drawings]
        jobs.append(Job(BASE, pictures[:1], dataclasses.replace(drawings[0], guidance=1.0)))
        jobs.append(Job("Flat-LoRA", pictures[:1], drawings[0], shake=Shake(0.1, 8)))
        told = list(studio.run(jobs))
    drawn = sum(isinstance(event, Drawn) for event in told)
    return f"{drawn} drawings, {len(told) - drawn} sketches"


class _AtOnce(threading.Thread):
    """Does its work where it is started: what answers for a card is known in one thread."""

    def start(self) -> None:
        self.run()


def rehearse_short_memory(dtype: torch.dtype) -> str:
    """A picture for which memory runs out in the UNet, and then in the VAE: each is done in less room."""
    with _on_card():
        pipeline = _pipeline(dtype)
        load_adapter(pipeline, "flat", ADAPTER)
        with _full_once(pipeline.unet, "forward"), _full_once(pipeline.vae, "decode"):
            draw_batch(pipeline, "flat", [(PROMPTS[0], 0)], Drawing(128, 128, 3))
        assert pipeline.text_encoder.device.type == "cuda", "it has come back"
    return "text encoders aside, then tiles"


@contextlib.contextmanager
def _full_once(model: nn.Module, method: str) -> Iterator[None]:
    """The first call within the block finds no memory; there must be another."""
    work, calls = getattr(model, method), []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args, **kwargs)

    with mock.patch.object(model, method, once):
        yield
    assert len(calls) > 1, "it was tried again"


def rehearse_validation(dtype: torch.dtype) -> str:
    """The trainer's pictures, with the VAE that waits on the CPU and prompts that were encoded before."""
    base = load_base(str(DEMO_BASE), dtype=dtype)
    add_lora({"unet": base.unet}, rank=4, alpha=4, seed=0)
    with _on_card():
        base.unet.to("cuda").train()
        for text_encoder in base.text_encoders:
            text_encoder.to("cuda").train()
        learner: Any = SimpleNamespace(
            base=base,
            prompts=None,
            accelerator=SimpleNamespace(
                device=torch.device("cuda"),
                autocast=lambda: torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32),
            ),
            learning={"unet": base.unet},
            in_tokens=lambda prompt: prompt,
        )
        config = TrainConfig(
            pretrained_model_name_or_path=str(DEMO_BASE),
            instance_data_dir=str(ASSETS / "icons-3d"),
            instance_prompt=PROMPTS[0],
            validation_prompt=PROMPTS,
            num_validation_images=1,
            validation_inference_steps=2,
            validation_resolution=128,
        )
        pictures = draw_validation(learner, config)
    assert pictures is not None
    return f"{len(pictures)} pictures"


def rehearse_grid(dtype: torch.dtype) -> str:
    """A grid in its folder: base and adapter, PNGs, manifest and sheet."""
    recipe = Recipe(
        base=str(DEMO_BASE),
        grid=Grid(PROMPTS, [0], [Method(BASE), Method("Flat-LoRA", "flat", 0.5)]),
        drawing=Drawing(64, 64, 2),
        adapters={"flat": ADAPTER},
        dtype=DTYPES[dtype],
        batch_size=2,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        _on_card(),
        mock.patch.object(grid_draw, "load_pipeline", lambda *_, dtype, **__: _pipeline(dtype)),
    ):
        grid_draw.draw_grid(recipe, Path(folder), device="cuda")
        return f"{len(list(Path(folder).glob('*.png'))) - 1} pictures"


def rehearse_evaluation(dtype: torch.dtype) -> str:
    """All parts of an evaluation but the sharpness, of one picture each."""
    icons = find_samples(ASSETS / "icons-3d-heldout", "an icon")[:1]
    plan = Plan(
        base=str(DEMO_BASE),
        adapters={"Flat-LoRA": ADAPTER},
        heldout=icons,
        training=icons,
        prompts=PROMPTS[:1],
        clip=str(ASSETS / "micro-clip"),
        resolution=128,
        steps=2,
        parts=("losses", "drawn", "flatness", "tradeoff"),
        device="cuda",
        dtype=DTYPES[dtype],
    )
    likeness = Likeness(str(ASSETS / "micro-clip"))
    smaller = {"SIGMAS": (0.1,), "DRAWS": 2, "LINE": (0.0, 0.5), "DIRECTIONS": 1, "PLANE": (0.0, 0.5)}
    parts: dict[str, Callable[..., Any]] = {
        "load_pipeline": lambda *_, dtype, **__: _pipeline(dtype),
        "Likeness": lambda *_: likeness,
    }
    with tempfile.TemporaryDirectory() as folder, _on_card():
        likeness._model = likeness._model.to("cuda")
        with mock.patch.multiple(evaluation, SCALES=(0.0, 1.0), **smaller, **parts):
            report = evaluation.Evaluation(plan, Path(folder)).run()
    assert not report["left_out"]
    return f"{', '.join(report['methods']['Flat-LoRA'])}"
