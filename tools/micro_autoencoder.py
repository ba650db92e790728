"""Stage one: the autoencoder, and the latents of every training picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from micro_data import BASE_STYLES
from micro_models import build_autoencoder
from micro_training import Stage, save_atomically
from torch.nn import functional as F

BATCH = 16


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def _colour(x: torch.Tensor) -> torch.Tensor:
    """The two opponent colours, red-green and blue-yellow."""
    red, green, blue = x.unbind(dim=1)
    return torch.stack([red - green, blue - (red + green) / 2], dim=1)


def _to_model(images: torch.Tensor) -> torch.Tensor:
    pixels = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)


def load_images(work: Path, styles: tuple[str, ...] | None = None) -> torch.Tensor:
    """The pictures of some styles (all when None) as one uint8 tensor (n, 64, 64, 3)."""
    with np.load(work / "images.npz") as arrays:
        return torch.from_numpy(np.concatenate([arrays[style] for style in styles or arrays.files]))


def train_autoencoder(work: Path, minutes: float, lr: float = 2e-3) -> AutoencoderKL:
    """Train on all styles: L1, its gradients' (sharp edges), squared error, colour, and a light KL term."""
    torch.manual_seed(0)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", model, work, minutes, lr=lr, seed=1)
    images = load_images(work)
    for _ in stage.steps():
        rows = torch.randint(len(images), (BATCH,), generator=stage.generator)
        pixels = _to_model(images[rows])
        flipped, recoloured = torch.rand(2, generator=stage.generator) < 0.5
        if flipped:
            pixels = pixels.flip(-1)
        if recoloured:
            # Most icons are yellow, red or blue: without this, green is still brown after a thousand steps.
            pixels = pixels[:, torch.randperm(3, generator=stage.generator)]
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=stage.generator)
        output = model.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(output, pixels) + F.mse_loss(output, pixels) + 1e-4 * divergence
        for ours, theirs in zip(_gradients(output), _gradients(pixels), strict=True):
            loss = loss + F.l1_loss(ours, theirs)
        error = _colour(output) - _colour(pixels)
        loss = loss + F.avg_pool2d(error, 4).abs().mean() + 2 * error.square().mean()
        stage.update(loss)
    return stage.average


@torch.no_grad()
def cache_latents(autoencoder: AutoencoderKL, work: Path) -> None:
    """Write ``latents.pt``: the base styles' latents (styles, n, 4, 16, 16) at unit variance, and factor."""
    latents = []
    error = 0.0
    images = load_images(work, BASE_STYLES)
    for rows in torch.arange(len(images)).split(64):
        pixels = _to_model(images[rows])
        latents.append(autoencoder.encode(pixels).latent_dist.mode())
        decoded = autoencoder.decode(latents[-1]).sample.clamp(-1, 1)
        error += (decoded - pixels).square().mean(dim=(1, 2, 3)).sum().item()
    psnr = 10 * math.log10(4 / (error / len(images)))
    latents = torch.cat(latents).contiguous()
    factor = 1 / latents.std().item()
    print(f"[autoencoder] PSNR {psnr:.2f} dB, scaling factor {factor:.4f}", flush=True)
    latents = (latents * factor).unflatten(0, (len(BASE_STYLES), -1))
    save_atomically({"latents": latents, "scaling_factor": factor}, work / "latents.pt")
