"""Stage one: the autoencoder, and the latents of every training picture."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from micro_data import SIZE, load_icons, to_pixels
from micro_models import LATENT_SIZE, build_autoencoder
from micro_subjects import BASE_STYLES, HELDOUT_SUBJECTS, STYLES
from micro_training import Stage, save_atomically
from torch.nn import functional as F

BATCH = 16  # crops in a batch
CROP = 64  # pixels a side: four pictures' quarters teach more than one picture
WHOLE_FROM = 0.7  # the part of training after which whole pictures are shown, a quarter as many in a batch
GRID = 8  # crops begin at multiples of it, as latents do


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def _colour(x: torch.Tensor) -> torch.Tensor:
    """The two opponent colours, red-green and blue-yellow."""
    red, green, blue = x.unbind(dim=1)
    return torch.stack([red - green, blue - (red + green) / 2], dim=1)


def draw_batch(images: torch.Tensor, whole: bool, generator: torch.Generator) -> torch.Tensor:
    """Pixels of whole pictures, or of four times as many crops of a quarter."""
    count = BATCH // 4 if whole else BATCH
    pictures = images[torch.randint(len(images), (count,), generator=generator)]
    if not whole:
        corners = torch.randint((SIZE - CROP) // GRID + 1, (count, 2), generator=generator) * GRID
        pictures = torch.stack(
            [
                picture[top : top + CROP, left : left + CROP]
                for picture, (top, left) in zip(pictures, corners.tolist(), strict=True)
            ]
        )
    pixels = to_pixels(pictures)
    flipped, recoloured = torch.rand(2, generator=generator) < 0.5
    if flipped:
        pixels = pixels.flip(-1)
    if recoloured:
        # Most icons are yellow, red or blue: without this, green is still brown after a thousand steps.
        pixels = pixels[:, torch.randperm(3, generator=generator)]
    return pixels


def train_autoencoder(work: Path, steps: int, device: torch.device, lr: float = 3e-3) -> None:
    """Train on all styles: L1, its gradients' (sharp edges), squared error, colour, and a light KL term."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device)
    stage = Stage("autoencoder", model, work, steps, lr=lr, seed=1)
    images = load_icons(work).autoencoder_images
    for step in stage.steps():
        pixels = draw_batch(images, step >= WHOLE_FROM * steps, stage.generator).to(device)
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
    """Write ``latents.pt``: the base styles' latents (styles, n, 4, 16, 16) at unit variance, and factor.

    The latents of pictures that a style lacks are zero. What is already of this autoencoder stays.
    """
    output = work / "latents.pt"
    if output.exists() and output.stat().st_mtime > (work / "autoencoder.ckpt").stat().st_mtime:
        return
    autoencoder, icons = load_autoencoder(work), load_icons(work)
    shape = (len(BASE_STYLES), len(icons.subjects), 4, LATENT_SIZE, LATENT_SIZE)
    latents = torch.zeros(shape)
    for index, style in enumerate(BASE_STYLES):
        rows = icons.has[style].nonzero().flatten()
        for part in rows.split(64):
            pixels = to_pixels(icons.images[style][part])
            latents[index, part] = autoencoder.encode(pixels).latent_dist.mode()
    factor = 1 / latents[icons.base_pairs()].std().item()
    save_atomically({"latents": latents * factor, "scaling_factor": factor}, output)
    print(f"[autoencoder] scaling factor {factor:.4f}", flush=True)


@torch.no_grad()
def score_autoencoder(work: Path) -> dict[str, float]:
    """PSNR in dB, by style, on the icons of the held-out subjects, which training never saw in any style."""
    autoencoder, icons = load_autoencoder(work), load_icons(work)
    rows = icons.rows(HELDOUT_SUBJECTS)
    scores, errors = {}, []
    for style in STYLES:
        pixels = to_pixels(icons.images[style][rows[icons.has[style][rows]]])
        decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - pixels).square().mean(dim=(1, 2, 3)))
        scores[style] = 10 * math.log10(4 / errors[-1].mean())
    scores["all"] = 10 * math.log10(4 / torch.cat(errors).mean())
    return scores
