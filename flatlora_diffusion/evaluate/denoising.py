"""The denoising loss of some pictures, always at the same timesteps and with the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn

from flatlora_diffusion.adapter.new_tokens import loaded_words, replace_words
from flatlora_diffusion.data.images import Framing, Sample
from flatlora_diffusion.data.latents import Batch, LatentCache, PromptCache, fixed_timesteps
from flatlora_diffusion.sdxl.encoding import PromptEmbeds, encode_images
from flatlora_diffusion.sdxl.loss import diffusion_losses


@dataclass(frozen=True)
class Band:
    """A part of the noise schedule: timesteps from `first` up to, but not including, `end`."""

    first: int
    end: int


class DenoisingSet:
    """Pictures as the UNet is shown them: latents and captions, at fixed timesteps with fixed noise.

    The noise is a function of the picture's place, so that every adapter, and the base, is asked the same
    questions; the trainer measures `heldout_loss` with the very same ones.

    Args:
        pipeline: Its VAE encodes the pictures, in float32.
        samples: Pictures and captions; transparent ones come on white.
        resolution: They are resized to this many pixels, and cropped in the centre.
        count: Timesteps of each picture, spread evenly over the schedule.

    Attributes:
        captions: One for each picture.
        timesteps: Those of every picture, ascending.
        levels: Timesteps of the noise schedule.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        samples: Sequence[Sample],
        resolution: int,
        count: int,
    ) -> None:
        self.captions = [sample.caption for sample in samples]
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        assert isinstance(scheduler, DDPMScheduler)
        self.scheduler = scheduler
        self.levels = scheduler.config["num_train_timesteps"]
        self.timesteps = fixed_timesteps(self.levels, count)
        framing = Framing(resolution=resolution, center_crop=True)
        vae, dtype = pipeline.vae, pipeline.vae.dtype
        try:
            if dtype != torch.float32:
                vae.to(torch.float32)
            self._latents = LatentCache(
                samples, lambda pixels: encode_images(vae, pixels), framing, 0, self.levels
            )
        finally:
            if dtype != torch.float32:
                vae.to(dtype)

    def __len__(self) -> int:
        return len(self.captions)

    @torch.no_grad()
    def losses(self, unet: nn.Module, prompts: PromptCache) -> Tensor:
        """The squared error of each picture at each timestep: (pictures, timesteps), float32, on the CPU.

        Args:
            unet: SDXL's UNet, as it is.
            prompts: Embeddings of the captions, see `embed`.
        """
        rows = [self.batch_losses(unet, prompts, batch) for batch in self.batches()]
        return torch.stack([row.cpu() for row in rows])

    def mean_loss(self, unet: nn.Module, prompts: PromptCache) -> float:
        """The mean of `losses`."""
        return self.losses(unet, prompts).mean().item()

    def parts_of_mean(self, unet: nn.Module, prompts: PromptCache) -> Iterator[Tensor]:
        """Differentiable scalars whose sum is `mean_loss`, one a picture and timestep."""
        count = len(self) * len(self.timesteps)
        for batch in self.batches():
            for single in batch.singles():  # second derivatives of more don't fit into a GPU
                yield self.batch_losses(unet, prompts, single).sum() / count

    def batches(self) -> Iterator[Batch]:
        """One batch a picture, with all its timesteps."""
        return self._latents.fixed_batches(self.timesteps)

    def batch_losses(self, unet: nn.Module, prompts: PromptCache, batch: Batch) -> Tensor:
        """The squared error of each sample of a batch: (N,), float32."""
        weight = next(unet.parameters())
        device, dtype = weight.device, weight.dtype
        embeds = prompts.embed(batch.captions)
        return diffusion_losses(
            unet,
            self.scheduler,
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            PromptEmbeds(embeds.tokens.to(device, dtype), embeds.pooled.to(device, dtype)),
            batch.time_ids.to(device),
        )

    def bands(self, count: int) -> list[tuple[Band, list[int]]]:
        """Equal parts of the noise schedule, each with the columns of `losses` that lie in it."""
        edges = [round(k * self.levels / count) for k in range(count + 1)]
        return [
            (
                Band(first, end),
                [column for column, timestep in enumerate(self.timesteps) if first <= timestep < end],
            )
            for first, end in itertools.pairwise(edges)
        ]


def embed(
    pipeline: StableDiffusionXLPipeline, adapter: str | None, captions: Sequence[str], chunks: int = 1
) -> PromptCache:
    """Embeddings of captions by the text encoders as they are now.

    Args:
        pipeline: With the adapter active, at the scale that is wanted.
        adapter: Name of the active adapter, whose new tokens stand in for the words that mean them.
        captions: In words; they are what the embeddings are asked for by.
        chunks: Pieces in which they are read, see `sdxl.encoding.encode_prompts`.
    """
    words = loaded_words(pipeline, adapter)
    return PromptCache(
        (pipeline.tokenizer, pipeline.tokenizer_2),
        (pipeline.text_encoder, pipeline.text_encoder_2),
        captions,
        lambda caption: replace_words(caption, words),
        chunks,
    )
