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


def where_cut(tokenizers: Sequence[CLIPTokenizer], prompt: str, chunks: int = 1) -> str | None:
    """Where a prompt that is too long for its text encoders ends for them.

    Args:
        tokenizers: Of both text encoders; the one that reads least counts.
        prompt: Any.
        chunks: Pieces that are read, see `encode_prompts`.

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
    needed = len(read.input_ids)
    if needed <= chunks:
        return None
    end = max(last for offsets in read.offset_mapping[:chunks] for _, last in offsets)
    last_words = " ".join(prompt[:end].split()[-_LAST_WORDS:])
    line = " ".join(prompt.split())
    begin = line if len(line) <= _SHOWN else f"{line[:_SHOWN].rstrip()}..."
    room = chunks * (length - tokenizer.num_special_tokens_to_add())
    return (
        f'"{begin}" is longer than the {room} tokens that the text encoders read: it ends for them with '
        f'"{last_words}"; --caption_chunks {needed} reads all of it'
    )


def tell_cut(tokenizers: Sequence[CLIPTokenizer], prompts: Iterable[str], chunks: int = 1) -> None:
    """A line in the log for each prompt that is too long, see `where_cut`."""
    for prompt in dict.fromkeys(prompts):
        if told := where_cut(tokenizers, prompt, chunks):
            logger.warning("%s", told)


def encode_prompts(
    tokenizers: Sequence[CLIPTokenizer],
    text_encoders: Sequence[nn.Module],
    prompts: Sequence[str],
    chunks: int = 1,
) -> PromptEmbeds:
    """Embeddings of prompts: both encoders' hidden states but for the last layer, the second one's pooled.

    With several chunks a prompt is read in pieces, of 75 tokens for SDXL's encoders, each between its own
    first and last token. Their hidden states stand one after the other, and the first piece's pooled output
    counts, as in A1111, ComfyUI and kohya's scripts.

    Args:
        tokenizers: Of both text encoders.
        text_encoders: Both.
        prompts: Any.
        chunks: Pieces of every prompt; those that a prompt doesn't fill are as of the empty prompt. What lies
            beyond them is cut.

    Returns:
        `tokens` has `chunks` times as many tokens as an encoder reads at once.
    """
    hidden = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        ids = token_ids(tokenizer, prompts, chunks)
        device = next(text_encoder.parameters()).device
        output = text_encoder(ids.to(device), output_hidden_states=True, return_dict=True)
        states = output.hidden_states[-2]
        hidden.append(states.reshape(len(prompts), -1, states.shape[-1]))
    return PromptEmbeds(torch.cat(hidden, dim=-1), output.text_embeds[::chunks])


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """What a text encoder is shown of prompts: (prompts * chunks, tokens), see `encode_prompts`."""
    return torch.tensor([piece for prompt in prompts for piece in _pieces(tokenizer, prompt, chunks)])


def _pieces(tokenizer: CLIPTokenizer, prompt: str, chunks: int) -> list[list[int]]:
    """The tokens of a prompt in so many pieces, each as long as its encoder reads at once."""

    def read(text: str) -> list[list[int]]:
        return tokenizer(
            text,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_overflowing_tokens=True,
        ).input_ids

    pieces = read(prompt)[:chunks]
    return pieces + read("") * (chunks - len(pieces))
