"""What the UNet is shown of the training images and captions, computed once before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import hash64, keyed_generator
from flatlora_diffusion.data.buckets import BatchSequence
from flatlora_diffusion.data.captions import AS_THEY_ARE, Captioning, CaptionStream
from flatlora_diffusion.data.encodings import Encoding, EncodingsOf
from flatlora_diffusion.data.images import Framing, Sample, sample_index, variants
from flatlora_diffusion.sdxl.encoding import Latents, PromptEmbeds, encode_prompts, token_ids


def fixed_timesteps(noise_levels: int, count: int) -> list[int]:
    """The middles of `count` equal parts of the noise schedule: where losses are compared."""
    return [round((k + 0.5) * noise_levels / count) for k in range(count)]


@dataclass(frozen=True)
class Batch:
    """Samples at some positions of the training stream, all of it a function of (seed, position).

    Attributes:
        captions: One for each sample, as the model is told it.
        latents: (N, channels, height, width), drawn from the VAE's posterior.
        noise: The same shape, unit normals; with a noise offset plus one normal a channel.
        timesteps: (N,), uniform over the noise levels.
        time_ids: (N, 6), see `sdxl.loss.diffusion_losses`.
        weights: (N, 1, height, width), how much each place counts in the loss; None where all count alike.
        perturbation: Of the shape of `noise`: what the UNet is shown on top of it, see `diffusion_losses`.
    """

    captions: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    time_ids: Tensor
    weights: Tensor | None = None
    perturbation: Tensor | None = None

    def joined(self, other: Batch) -> Batch:
        """These samples, then the other ones; both have weights or neither, and so with a perturbation."""
        weights = perturbation = None
        if self.weights is not None and other.weights is not None:
            weights = torch.cat([self.weights, other.weights])
        if self.perturbation is not None and other.perturbation is not None:
            perturbation = torch.cat([self.perturbation, other.perturbation])
        return Batch(
            self.captions + other.captions,
            torch.cat([self.latents, other.latents]),
            torch.cat([self.noise, other.noise]),
            torch.cat([self.timesteps, other.timesteps]),
            torch.cat([self.time_ids, other.time_ids]),
            *(weights, perturbation),
        )

    def singles(self) -> Iterator[Batch]:
        """Each sample as a batch of its own."""
        for place, caption in enumerate(self.captions):
            tensors = (self.latents, self.noise, self.timesteps, self.time_ids)
            weights = None if self.weights is None else self.weights[place : place + 1]
            yield Batch([caption], *(tensor[place : place + 1] for tensor in tensors), weights=weights)


class LatentCache:
    """The latents of every variant of every image, and the endless stream of samples made of them.

    Args:
        samples: The training images.
        encode: Images (1, 3, height, width) -> their latents.
        framing: How they are shown.
        seed: Decides crops, order and draws.
        noise_levels: Timesteps of the noise schedule.
        captioning: How their captions are told.
        batch_size: So many positions in a row have images of one size.
        noise_offset: The noise has this times one normal a channel on top.
        perturbation: The UNet is shown this times further normals on top of the noise that it predicts.
        background_weight: How much transparent parts count in the loss, where opaque ones count 1; None: all
            count alike.
        progress: Wraps the samples while they are encoded.

    Attributes:
        captions: What the model is told at each position.

    Raises:
        UserError: Nothing of a variant counts.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encode: Callable[[Tensor], Latents],
        framing: Framing,
        seed: int,
        noise_levels: int,
        *,
        captioning: Captioning = AS_THEY_ARE,
        batch_size: int = 1,
        noise_offset: float = 0.0,
        perturbation: float = 0.0,
        background_weight: float | None = None,
        progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
    ) -> None:
        self.captions = CaptionStream([sample.caption for sample in samples], captioning, seed)
        self._seed = seed
        self._noise_levels = noise_levels
        self._noise_offset = noise_offset
        self._perturbation = perturbation
        self._variants: list[list[tuple[Latents, Tensor, Tensor | None]]] = []
        for sample in progress(samples):
            encoded = []
            for variant in variants(sample, framing, seed):
                latents = encode(variant.pixels[None])
                size = tuple(variant.pixels.shape[-2:])
                time_ids = torch.tensor(variant.original_size + variant.crop_top_left + size)
                own = Latents(latents.mean[0].cpu(), latents.std[0].cpu())
                weights = None
                if background_weight is not None:
                    weights = alpha_weights(variant.alpha, own.mean.shape[-2:], background_weight)
                    if not weights.any():
                        raise UserError(
                            f"{sample.path}: nothing is opaque where it is cropped, so that nothing of it "
                            "would be trained; give --center_crop, an --alpha_background_weight above 0, or "
                            "remove it"
                        )
                encoded.append((own, time_ids, weights))
            self._variants.append(encoded)
        members: dict[tuple[int, ...], list[int]] = {}
        for index, (sample, encoded) in enumerate(zip(samples, self._variants, strict=True)):
            members.setdefault(encoded[0][0].mean.shape, []).extend([index] * sample.repeats)
        self._buckets = [members[shape] for shape in sorted(members)]
        self._batch_size = batch_size
        self._sequence = BatchSequence([len(b) for b in self._buckets], batch_size, seed)

    def _index(self, position: int) -> int:
        """Which image is at a position of the stream."""
        number, place = divmod(position, self._batch_size)
        bucket, first = self._sequence.locate(number)
        # A bucket's order is its own; that of the only bucket is the seed's.
        seed = self._seed if len(self._buckets) == 1 else hash64(self._seed, "bucket", bucket)
        members = self._buckets[bucket]
        return members[sample_index(seed, first + place, len(members))]

    def batch(self, positions: Iterable[int]) -> Batch:
        """The samples at these positions of the stream.

        With aspect buckets, positions `n * batch_size` to `(n + 1) * batch_size - 1` have images of one size.
        """
        captions, latents, noise, timesteps, time_ids, weights = [], [], [], [], [], []
        perturbation: list[Tensor] = []
        for position in positions:
            index = self._index(position)
            draws = keyed_generator(self._seed, "draws", position)
            variant = int(torch.randint(len(self._variants[index]), (), generator=draws))
            posterior, ids, own_weights = self._variants[index][variant]
            shape = posterior.mean.shape
            captions.append(self.captions.at(position, index))
            latents.append(posterior.mean + posterior.std * torch.randn(shape, generator=draws))
            noise.append(torch.randn(shape, generator=draws))
            timesteps.append(torch.randint(self._noise_levels, (), generator=draws))
            if self._noise_offset:
                noise[-1] += self._noise_offset * torch.randn(shape[0], 1, 1, generator=draws)
            if self._perturbation:  # last: without it all other draws are the same
                perturbation.append(self._perturbation * torch.randn(shape, generator=draws))
            time_ids.append(ids)
            if own_weights is not None:
                weights.append(own_weights)
        tensors = (torch.stack(values) for values in (latents, noise, timesteps, time_ids))
        return Batch(
            captions,
            *tensors,
            weights=torch.stack(weights) if weights else None,
            perturbation=torch.stack(perturbation) if perturbation else None,
        )

    def fixed_batches(self, timesteps: Sequence[int]) -> Iterator[Batch]:
        """Every image once at each of these timesteps, one batch an image, always with the same noise."""
        for index, encoded in enumerate(self._variants):
            posterior, ids, weights = encoded[0]
            draws = keyed_generator(self._seed, "fixed", index)
            shape = (len(timesteps), *posterior.mean.shape)
            yield Batch(
                [self.captions.whole[index]] * len(timesteps),
                posterior.mean.expand(shape),
                torch.randn(shape, generator=draws),
                torch.tensor(timesteps),
                ids.expand(len(timesteps), -1),
                None if weights is None else weights.expand(len(timesteps), -1, -1, -1),
            )


def alpha_weights(alpha: Tensor | None, size: Sequence[int], background_weight: float) -> Tensor:
    """How much each place of an image's latents counts: `a + (1 - a) b`, (1, height, width).

    Args:
        alpha: (pixels down, pixels across) of the image, of which `a` is the mean over a place's pixels; None
            where it is opaque.
        size: Height and width of the latents.
        background_weight: `b`.
    """
    if alpha is None:
        return torch.ones(1, *size)
    opaque = F.interpolate(alpha[None, None], tuple(size), mode="area")[0]
    return opaque + (1 - opaque) * background_weight


class PromptCache:
    """Embeddings of prompts, computed once and kept on the CPU.

    Args:
        tokenizers: Of both text encoders.
        text_encoders: In the precision in which they run, and on their device where none is given.
        prompts: All prompts that will be asked for.
        spell: What the text encoders are told in the place of a prompt.
        chunks: Pieces in which they read it, see `encode_prompts`.
        kept: What these text encoders made of prompts before.
        device: Where they are brought when there is a prompt to be encoded.
    """

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        text_encoders: Sequence[nn.Module],
        prompts: Iterable[str],
        spell: Callable[[str], str] = str,
        chunks: int = 1,
        *,
        kept: EncodingsOf | None = None,
        device: torch.device | None = None,
    ) -> None:
        def encode(text: str) -> Encoding:
            if device is not None:
                for text_encoder in text_encoders:
                    text_encoder.to(device)
            embeds = encode_prompts(tokenizers, text_encoders, [text], chunks)
            return embeds.tokens.cpu(), embeds.pooled.cpu()

        self._embeds = {}
        with torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                text = spell(prompt)
                if kept is None:
                    encoding = encode(text)
                else:
                    shown = [token_ids(tokenizer, [text], chunks) for tokenizer in tokenizers]
                    encoding = kept.get(shown, partial(encode, text))
                self._embeds[prompt] = PromptEmbeds(*encoding)

    def embed(self, prompts: Iterable[str]) -> PromptEmbeds:
        """The embeddings of some of the prompts, stacked."""
        known = [self._embeds[prompt] for prompt in prompts]
        return PromptEmbeds(torch.cat([k.tokens for k in known]), torch.cat([k.pooled for k in known]))


HELDOUT_TIMESTEPS = 8
