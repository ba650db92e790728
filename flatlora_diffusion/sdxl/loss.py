"""The denoising loss of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
)
from torch import Tensor, nn

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.sdxl.encoding import PromptEmbeds


def diffusion_losses(
    unet: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompts: PromptEmbeds,
    time_ids: Tensor,
    snr_gamma: float | None = None,
    weights: Tensor | None = None,
    perturbation: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise (or velocity, as the base's scheduler says), (N,) float32.

    Args:
        unet: SDXL's UNet, wrapped or not.
        noise_scheduler: Gives the noise levels and the kind of prediction.
        latents: (N, channels, height, width), without noise.
        noise: The same shape, unit normals.
        timesteps: (N,), whole numbers.
        prompts: Embeddings of N prompts.
        time_ids: (N, 6): original height and width, top and left of the crop, target height and width.
        snr_gamma: Weight each sample's error by `min_snr_weights`.
        weights: (N, 1, height, width), 0 or more: a sample's error is the mean weighted by these.
        perturbation: Of the shape of `noise`: input perturbation (arXiv 2301.11706), added to the noise in
            what the UNet is shown, and not in what it is to predict.
    """
    shown = noise if perturbation is None else noise + perturbation
    # diffusers' types ask for int32 where its pipelines give int64, too.
    noisy = noise_scheduler.add_noise(latents, shown, timesteps)  # pyright: ignore[reportArgumentType]
    conditions = {"text_embeds": prompts.pooled, "time_ids": time_ids}
    noisy = noisy.to(prompts.tokens.dtype)  # that of the frozen base
    predicted = unet(noisy, timesteps, prompts.tokens, added_cond_kwargs=conditions, return_dict=False)[0]
    kind = noise_scheduler.config["prediction_type"]
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    else:
        raise UserError(
            f"the base's scheduler predicts {kind!r}; only epsilon and v_prediction can be trained"
        )
    squares = F.mse_loss(predicted.float(), target.float(), reduction="none")
    if weights is not None:
        squares = squares * (weights / weights.mean(dim=(1, 2, 3), keepdim=True))
    errors = squares.mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        errors = errors * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
    return errors


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR loss weights (arXiv 2303.09556, section 3.4) of samples at these timesteps, (N,) float32.

    The weight of the denoised image's squared error is `min(SNR, gamma)`. An error of epsilon counts
    `1 / SNR` of that, an error of the velocity `1 / (SNR + 1)`.
    """
    signal = noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = signal / (1 - signal)
    if noise_scheduler.config["prediction_type"] == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr < gamma, 1.0, gamma / snr)  # also where the last timestep has no signal at all
