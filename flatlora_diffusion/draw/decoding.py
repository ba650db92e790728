"""Latents to pixels in a precision that the VAE stands, and why a picture came out black."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flatlora_diffusion.common.devices import if_memory_lasts


def decoding_dtype(vae: AutoencoderKL) -> torch.dtype:
    """The precision in which a VAE decodes: float32 where it asks for it (`force_upcast`).

    SDXL's own does: it overflows in float16. Others are trusted in the precision of their weights.
    """
    return torch.float32 if vae.config["force_upcast"] else vae.dtype


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The pixels of latents, in the VAE's own precision even where the caller is under autocast.

    Autocast would compute in half precision whatever precision the weights have.

    Args:
        vae: Its weights are afterwards in the precision in which they were.
        latents: (N, channels, height, width) in the scale in which the UNet sees them.

    Returns:
        (N, 3, height, width), about [-1, 1].
    """
    config, own = vae.config, vae.dtype
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        latents = latents.to(vae.device, decoding_dtype(vae))
        if config["latents_mean"] is not None and config["latents_std"] is not None:
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1).to(latents)
                for values in (config["latents_mean"], config["latents_std"])
            )
            latents = latents * std / config["scaling_factor"] + mean
        else:
            latents = latents / config["scaling_factor"]
        try:
            # Not the models' own `to`, which warns of every change of precision.
            nn.Module.to(vae, latents.dtype)
            return if_memory_lasts(
                lambda: _decoded(vae, latents),
                lambda: _in_tiles(vae, latents),
                "while a picture was decoded: it is decoded in tiles, whose seams may show a little",
            )
        finally:
            nn.Module.to(vae, own)


def _decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


def _in_tiles(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decoded a tile of at most 64 x 64 at a time; they overlap by a quarter."""
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    own = {name: getattr(vae, name) for name in names}
    side = min(64, max(latents.shape[-2:]) // 2)
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    try:
        for name, value in zip(names, (True, side, side * scale), strict=True):
            setattr(vae, name, value)
        return _decoded(vae, latents)
    finally:
        for name, value in own.items():
            setattr(vae, name, value)


def why_black(latents: Tensor, pixels: Tensor, unet_dtype: torch.dtype, vae_dtype: torch.dtype) -> str | None:
    """Why a picture is black or partly so, and what to do; None for a sound one.

    Args:
        latents: The denoised ones.
        pixels: What the VAE made of them.
        unet_dtype: Precision in which they were denoised.
        vae_dtype: Precision in which they were decoded.
    """
    if not latents.isfinite().all():
        remedy = (
            "use bf16 or fp32"
            if unet_dtype == torch.float16
            else "the base or the adapter is broken: take an earlier checkpoint, or train with a lower "
            "--learning_rate"
        )
        return f"denoising in {_name(unet_dtype)} gave numbers that are not finite; {remedy}"
    if not pixels.isfinite().all():
        remedy = "use bf16 or fp32, or give" if vae_dtype == torch.float16 else "give"
        return (
            f"the VAE overflowed in {_name(vae_dtype)}; {remedy} another one "
            "(--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix)"
        )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
