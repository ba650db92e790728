"""Pictures of the adapter in training: drawn in `eval()`, so without noise, to disk and the tracker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from flatlora_diffusion import record
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.gallery import Gallery, step_name, validation_drawing, validation_seeds
from flatlora_diffusion.generate import draw, release
from flatlora_diffusion.learner import Learner
from flatlora_diffusion.sdxl import PromptEmbeds, evaluating

logger = logging.getLogger(__name__)


def draw_validation(learner: Learner, config: TrainConfig) -> list[Image.Image] | None:
    """The validation prompts drawn with the models as they are; the models are then back in training mode.

    Args:
        learner: Its UNet carries the adapter; the VAE is on the CPU.
        config: Prompts, seeds, size, steps and guidance.

    Returns:
        The pictures of the first prompt, one for each seed, then those of the next. None where the device's
        memory ran out: the log says so, and training can go on.
    """
    try:
        return _draw_all(learner, config)
    except torch.OutOfMemoryError:
        logger.warning(
            "out of memory while the validation pictures were drawn: there are none this time, and training "
            "goes on; --validation_epochs 0 draws after training only"
        )
        return None
    finally:
        release()


def _draw_all(learner: Learner, config: TrainConfig) -> list[Image.Image]:
    base, prompts, accelerator = learner.base, learner.prompts, learner.accelerator
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae,
        unet=base.unet,
        text_encoder=base.text_encoders[0] if base.text_encoders else None,
        text_encoder_2=base.text_encoders[1] if base.text_encoders else None,
        tokenizer=base.tokenizers[0],
        tokenizer_2=base.tokenizers[1],
        scheduler=base.sampler,
        force_zeros_for_empty_prompt=base.zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    drawing = validation_drawing(config)

    def conditions(prompt: str) -> dict[str, Any]:
        prompt = learner.in_tokens(prompt)
        if prompts is None:
            return {"prompt": prompt}
        wanted, empty = prompts.embed([prompt]), prompts.embed([""])
        if base.zeros_for_empty_prompt:
            empty = PromptEmbeds(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))
        embeds = {
            "prompt_embeds": wanted.tokens,
            "pooled_prompt_embeds": wanted.pooled,
            "negative_prompt_embeds": empty.tokens,
            "negative_pooled_prompt_embeds": empty.pooled,
        }
        return {name: tensor.to(accelerator.device) for name, tensor in embeds.items()}

    try:
        base.vae.to(accelerator.device)
        with evaluating(learner.learning.values()), accelerator.autocast():
            return [
                draw(pipeline, seed, drawing, prompt, **conditions(prompt))
                for prompt, seed in _pictures(config)
            ]
    finally:
        base.vae.to("cpu")


def report_validation(
    pictures: Sequence[Image.Image],
    step: int,
    gallery: Gallery,
    config: TrainConfig,
    accelerator: Accelerator,
) -> None:
    """Write the pictures and their sheet into the gallery, and send them to TensorBoard or wandb.

    Raises:
        UserError: The disk is full or not writable.
    """
    gallery.write(pictures, step_name(step), f"{record.method(config)} after step {step}")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(picture) for picture in pictures])
            tracker.log_images({"validation": stack}, step=step, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb

            captioned = [
                wandb.Image(picture, caption=f"{prompt} (seed {seed})")
                for picture, (prompt, seed) in zip(pictures, _pictures(config), strict=True)
            ]
            tracker.log({"validation": captioned}, step=step)


def _pictures(config: TrainConfig) -> list[tuple[str, int]]:
    """Prompt and seed of every picture, in the order in which they are drawn."""
    return [(prompt, seed) for prompt in config.validation_prompt or () for seed in validation_seeds(config)]
