"""Stage one: the autoencoder, and the latents of every training picture."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from micro_data import BASE_STYLES, HELDOUT_SUBJECTS, STYLES, load_icons, to_pixels
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


def train_autoencoder(work: Path, steps: int, device: torch.device, lr: float = 3e-3) -> None:
    """Train on all styles: L1, its gradients' (sharp edges), squared error, colour, and a light KL term."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)
    stage = Stage("autoencoder", model, work, steps, lr=lr, seed=1)
    images = load_icons(work).autoencoder_images
    for _ in stage.steps():
        rows = torch.randint(len(images), (BATCH,), generator=stage.generator)
        pixels = to_pixels(images[rows])
        flipped, recoloured = torch.rand(2, generator=stage.generator) < 0.5
        if flipped:
            pixels = pixels.flip(-1)
        if recoloured:
            # Most icons are yellow, red or blue: without this, green is still brown after a thousand steps.
            pixels = pixels[:, torch.randperm(3, generator=stage.generator)]
        pixels = pixels.to(device, memory_format=torch.channels_last)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=stage.generator).to(device)
        output = model.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(output, pixels) + F.mse_loss(output, pixels) + 1e-4 * divergence
        for ours, theirs in zip(_gradients(output), _gradients(pixels), strict=True):
            loss = loss + F.l1_loss(ours, theirs)
        error = _colour(output) - _colour(pixels)
        loss = loss + F.avg_pool2d(error, 4).abs().mean() + 2 * error.square().mean()
        stage.update(loss)


def load_autoencoder(work: Path) -> AutoencoderKL:
    """The trained autoencoder (running average)."""
    model = build_autoencoder()
    model.load_state_dict(torch.load(work / "autoencoder.ckpt", weights_only=True)["average"])
    return model.eval()


@torch.no_grad()
def cache_latents(work: Path) -> None:
    """Write ``latents.pt``: the base styles' latents (styles, n, 4, 16, 16) at unit variance, and factor."""
    autoencoder, icons = load_autoencoder(work), load_icons(work)
    latents = [
        torch.cat(
            [autoencoder.encode(to_pixels(part)).latent_dist.mode() for part in icons.images[style].split(64)]
        )
        for style in BASE_STYLES
    ]
    latents = torch.stack(latents)
    factor = 1 / latents.std().item()
    save_atomically({"latents": latents * factor, "scaling_factor": factor}, work / "latents.pt")
    print(f"[autoencoder] scaling factor {factor:.4f}", flush=True)


@torch.no_grad()
def score_autoencoder(work: Path) -> dict[str, float]:
    """PSNR in dB, by style, on the icons of the held-out subjects, which training never saw in any style."""
    autoencoder, icons = load_autoencoder(work), load_icons(work)
    rows = icons.rows(HELDOUT_SUBJECTS)
    scores, errors = {}, []
    for style in STYLES:
        pixels = to_pixels(icons.images[style][rows])
        decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - pixels).square().mean())
        scores[style] = 10 * math.log10(4 / errors[-1])
    scores["all"] = 10 * math.log10(4 / torch.stack(errors).mean())
    return scores
