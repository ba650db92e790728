"""Pictures of the adapter in training: drawn in `eval()`, so without noise, to disk and the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.generate import Drawing, draw, release
from flatlora_diffusion.learner import Learner
from flatlora_diffusion.sdxl import PromptEmbeds, evaluating


def draw_validation(learner: Learner, config: TrainConfig) -> list[Image.Image]:
    """The validation prompts drawn with the models as they are; the models are then back in training mode.

    Args:
        learner: Its UNet carries the adapter; the VAE is on the CPU.
        config: Prompts, seeds, size, steps and guidance.
    """
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
    drawing = Drawing(config.resolution, config.validation_inference_steps, config.validation_guidance_scale)

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

    base.vae.to(accelerator.device)
    try:
        with evaluating(learner.learning.values()), accelerator.autocast():
            return [
                draw(pipeline, config.seed + offset, drawing, **conditions(prompt))
                for prompt in config.validation_prompt or ()
                for offset in range(config.num_validation_images)
            ]
    finally:
        base.vae.to("cpu")
        release()


def report_validation(
    pictures: Sequence[Image.Image], step: int, folder: Path, accelerator: Accelerator
) -> None:
    """Write the pictures side by side to `step-NNNNNN.png` in the folder, and send them to TensorBoard."""
    folder.mkdir(exist_ok=True)
    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        strip.paste(picture, (index * picture.width, 0))
    strip.save(folder / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(picture) for picture in pictures])
            tracker.log_images({"validation": stack}, step=step, dataformats="NHWC")
