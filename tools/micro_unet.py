"""Stage four: the UNet, on cached latents; captions are drawn and encoded as training goes."""

from __future__ import annotations

from pathlib import Path

import torch
from micro_captions import Captions
from micro_data import load_icons
from micro_models import IMAGE_SIZE, build_scheduler, build_unet, encode, tokenize
from micro_text import load_text
from micro_training import Stage, fast_autocast, rows_of_step
from torch.nn import functional as F

BATCH = 16
DROPOUT = 0.1  # share of pictures without any caption, for classifier-free guidance
# Timesteps are a uniform draw to this power. Below 1, less noisy ones are rarer: there the caption tells
# nothing that the noisy picture doesn't.
TIMESTEP_POWER = 0.6


def loss_weights(signal: torch.Tensor) -> torch.Tensor:
    """Weights of the squared error of epsilon at each timestep, of mean 1.

    A plain epsilon loss counts an error of the denoised picture ``SNR`` times, next to nothing where noise
    is strong, where the caption decides shape and colour. ``(min(SNR, 5) + 1) / SNR`` counts it
    ``min(SNR, 5) + 1`` times instead. The cap keeps a few of the noisiest pictures from ruling the gradient.

    Args:
        signal: cumulative product of the alphas, one a timestep.
    """
    snr = signal / (1 - signal)
    weights = ((snr.clamp(max=5) + 1) / snr).clamp(max=25)
    return weights / weights.mean()


def train_unet(work: Path, steps: int, device: torch.device, lr: float = 1e-3) -> None:
    """Train on epsilon prediction; the text encoders stay as they are."""
    torch.manual_seed(4)
    icons = load_icons(work)
    all_styles, all_subjects = icons.base_pairs()
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"].to(device)
    tokenizer, text = load_text(work)
    captions = Captions(icons.subjects, tokenizer)
    text = text.to(device).requires_grad_(False)
    signal = build_scheduler().alphas_cumprod
    weights = loss_weights(signal).to(device)
    # (original size, crop's corner, target size), each (height, width), as the pipeline passes them.
    time_ids = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE], dtype=torch.float32)
    time_ids = time_ids.repeat(BATCH, 1).to(device)

    unet = build_unet().to(device, memory_format=torch.channels_last)
    stage = Stage("unet", unet, work, steps, lr=lr, seed=5, decay=0.999, muon=False)
    draw = stage.generator
    for step in stage.steps():
        chosen = rows_of_step(step, BATCH, len(all_styles), seed=6)
        styles, subjects = all_styles[chosen], all_subjects[chosen]
        ids = tokenize(tokenizer, captions.draw(styles, subjects, draw)).to(device)
        context, pooled, _ = encode((text["one"], text["two"]), ids)
        # An empty prompt is all zeros in SDXL (force_zeros_for_empty_prompt), so a dropped caption is, too.
        kept = (torch.rand(BATCH, generator=draw) >= DROPOUT).float().to(device)
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        context = context * kept[:, None, None]
        clean = latents[styles, subjects]
        noise = torch.randn(clean.shape, generator=draw).to(device)
        # One draw in each of BATCH equal parts: the loss varies less than with independent draws.
        parts = (torch.arange(BATCH) + torch.rand(BATCH, generator=draw)) / BATCH
        timesteps = (parts**TIMESTEP_POWER * len(signal)).long().clamp(max=len(signal) - 1)
        scale = signal[timesteps].view(-1, 1, 1, 1).to(device)
        noisy = scale.sqrt() * clean + (1 - scale).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        timesteps = timesteps.to(device)
        with fast_autocast(device):
            predicted = unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        stage.update((weights[timesteps] * errors).mean())
