"""Pictures to latents, prompts to embeddings, as SDXL's pipeline makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Latents:
    """What the VAE's encoder says of some images: a normal distribution for each latent value, scaled.

    Attributes:
        mean: (images, channels, height, width), float32.
        std: The same shape.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """What the UNet is told of some prompts.

    Attributes:
        tokens: (prompts, tokens, features of both encoders).
        pooled: (prompts, features of the second encoder).
    """

    tokens: Tensor
    pooled: Tensor


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Latents:
    """Latents of images (N, 3, height, width) in [-1, 1], in the scale in which the UNet sees them."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)[0]
    mean, std = posterior.mean.float(), posterior.std.float()
    channel_mean, channel_std = (
        torch.tensor(values, device=mean.device).view(1, -1, 1, 1) if values is not None else neutral
        for values, neutral in ((vae.config["latents_mean"], 0.0), (vae.config["latents_std"], 1.0))
    )
    scale = vae.config["scaling_factor"] / channel_std
    return Latents((mean - channel_mean) * scale, std * scale)


def encode_prompts(
    tokenizers: Sequence[CLIPTokenizer], text_encoders: Sequence[nn.Module], prompts: Sequence[str]
) -> PromptEmbeds:
    """Embeddings of prompts: both encoders' hidden states but for the last layer, the second one's pooled."""
    hidden = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        device = next(text_encoder.parameters()).device
        output = text_encoder(ids.to(device), output_hidden_states=True, return_dict=True)
        hidden.append(output.hidden_states[-2])
    return PromptEmbeds(torch.cat(hidden, dim=-1), output.text_embeds)
