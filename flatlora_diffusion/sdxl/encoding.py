"""Pictures to latents, prompts to embeddings, as SDXL's pipeline makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

_SHOWN = 60  # characters of a prompt, to tell it from others
_LAST_WORDS = 5


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


def where_cut(tokenizers: Sequence[CLIPTokenizer], prompt: str) -> str | None:
    """Where a prompt that is too long for its text encoders ends for them.

    Args:
        tokenizers: Of both text encoders; the one that reads least counts.
        prompt: Any.

    Returns:
        The last words that count, a line for people; None where all of the prompt counts.
    """
    tokenizer = min(tokenizers, key=lambda own: own.model_max_length)
    length = tokenizer.model_max_length
    read = tokenizer(
        prompt,
        truncation=True,
        max_length=length,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    if len(read.input_ids) == 1:
        return None
    end = max(last for _, last in read.offset_mapping[0])
    last_words = " ".join(prompt[:end].split()[-_LAST_WORDS:])
    line = " ".join(prompt.split())
    begin = line if len(line) <= _SHOWN else f"{line[:_SHOWN].rstrip()}..."
    return (
        f'"{begin}" is longer than the {length - tokenizer.num_special_tokens_to_add()} tokens that the text '
        f'encoders read: it ends for them with "{last_words}"'
    )


def tell_cut(tokenizers: Sequence[CLIPTokenizer], prompts: Iterable[str]) -> None:
    """A line in the log for each prompt that is too long, see `where_cut`."""
    for prompt in dict.fromkeys(prompts):
        if told := where_cut(tokenizers, prompt):
            logger.warning("%s", told)


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
