"""DreamBooth training of SDXL from a configuration: checks, one run or two, and the comparison picture."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers.utils.logging import disable_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from flatlora_diffusion import data, prior, record, sdxl
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.errors import UserError
from flatlora_diffusion.generate import DTYPES, Drawing, compare, load_pipeline, release
from flatlora_diffusion.launch import join_processes, leave_processes
from flatlora_diffusion.run import Run

logger = logging.getLogger(__name__)

COMPARISON = "comparison.png"


def train(config: TrainConfig) -> None:
    """Train as configured; with `compare`, plain LoRA and Flat-LoRA one after the other, and draw both.

    Leaves `pytorch_lora_weights.safetensors` and `summary.json` in the output folder (with `compare`, in
    `lora/` and `flat_lora/` inside it), and `comparison.png` where there are prompts to draw.

    Raises:
        UserError: Bad input. Nothing has been written, or what was there before is still there.
        RunInterruptedError: A signal stopped the run after a checkpoint was saved.
    """
    disable_progress_bar()
    disable_transformers_progress_bar()
    join_processes(config)
    samples = data.find_samples(Path(config.instance_data_dir), config.instance_prompt)
    data.parse_background(config.background)
    sdxl.check_base(config.pretrained_model_name_or_path)
    _check_writable(Path(config.output_dir))
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    heldout_samples = _heldout_samples(config)
    class_samples = prior.class_samples(config) if config.with_prior_preservation else ()
    adapters = {}
    for arm in _arms(config):
        logger.info("%s: %d images, into %s", record.method(arm), len(samples), arm.output_dir)
        Run(arm, samples, class_samples, heldout_samples).train()
        adapters[record.method(arm)] = Path(arm.output_dir)
        release()
    if AcceleratorState().is_main_process and (config.compare or config.validation_prompt):
        _draw_comparison(config, samples, adapters)
    leave_processes()


def _heldout_samples(config: TrainConfig) -> list[data.Sample]:
    if config.heldout_data_dir is None:
        return []
    flag = f"--heldout_data_dir {config.heldout_data_dir}"
    return data.find_samples(Path(config.heldout_data_dir), config.instance_prompt, flag)


def _arms(config: TrainConfig) -> list[TrainConfig]:
    """The runs to do: with `compare` a plain one and one with noise, equal in everything else."""
    if not config.compare:
        return [config]
    plain = dataclasses.replace(
        config, compare=False, flat_sigma=0.0, output_dir=str(Path(config.output_dir, "lora"))
    )
    flat = dataclasses.replace(config, compare=False, output_dir=str(Path(config.output_dir, "flat_lora")))
    return [plain, flat]


def _check_writable(folder: Path) -> None:
    """Refuse an output folder that can't be made or written, before anything is loaded.

    Raises:
        UserError: Names the folder and the obstacle.
    """
    existing = folder
    while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a link to nowhere"
        raise UserError(f"--output_dir {folder}: {existing} is {kind}, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {existing} cannot be written to; give another folder")


def _draw_comparison(config: TrainConfig, samples: list[data.Sample], adapters: dict[str, Path]) -> None:
    """The base beside the adapters, loaded from disk as any user would load them."""
    output = Path(config.output_dir)
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    state = AcceleratorState()
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        device=state.device,
        dtype=DTYPES.get(state.mixed_precision, torch.float32),
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
    )
    drawing = Drawing(config.resolution, config.validation_inference_steps, config.validation_guidance_scale)
    base = Path(config.pretrained_model_name_or_path).name
    sheet = compare(
        pipeline,
        adapters,
        config.validation_prompt or captions[:4],
        range(config.seed, config.seed + config.num_validation_images),
        drawing,
        output / "comparison",
        title="The same prompt, seed and initial noise in every row",
        strip=[sample.path for sample in samples],
        footer=(
            f"{base}, {len(samples)} training images, rank {config.rank}, "
            f"learning rate {config.learning_rate:g}, Flat-LoRA sigma {config.flat_sigma:g} "
            f"({config.flat_schedule}); {drawing.steps} denoising steps, guidance {drawing.guidance:g}"
        ),
    )
    sheet.save(output / COMPARISON)
    logger.info("the comparison is in %s", output / COMPARISON)
