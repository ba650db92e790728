"""What a run trains: the base with its adapters, what they are shown, and their loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from flatlora_diffusion.adapter.file import load_adapter_tensors
from flatlora_diffusion.adapter.new_tokens import NewTokens, new_tokens, replace_words
from flatlora_diffusion.adapter.start import read_start, require_layers
from flatlora_diffusion.common.devices import release, require_room
from flatlora_diffusion.common.seeds import hash64, seeded
from flatlora_diffusion.config.layers import parse_layers
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.captions import AS_THEY_ARE, Captioning
from flatlora_diffusion.data.encodings import Encodings, EncodingsOf
from flatlora_diffusion.data.images import WHITE, Framing, Sample, parse_background
from flatlora_diffusion.data.latents import (
    HELDOUT_TIMESTEPS,
    Batch,
    LatentCache,
    PromptCache,
    fixed_timesteps,
)
from flatlora_diffusion.flat.noisy_base import compute_dequantized
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import (
    Latents,
    PromptEmbeds,
    encode_images,
    encode_prompts,
    tell_cut,
)
from flatlora_diffusion.sdxl.initialise import check, initialise, subtract_initial_update
from flatlora_diffusion.sdxl.lora import (
    TEXT_ENCODERS,
    UNET_TARGETS,
    add_lora,
    enable_gradient_checkpointing,
    evaluating,
)
from flatlora_diffusion.sdxl.loss import diffusion_losses
from flatlora_diffusion.sdxl.quantize import quantize

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Objective(nn.Module):
    """The losses of a batch as one module: what averages gradients over processes wraps one forward pass."""

    def __init__(self, models: dict[str, nn.Module], losses: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self._losses = losses

    def forward(self, batch: Batch) -> Tensor:
        """(N,) losses."""
        return self._losses(batch)


class Learner:
    """An SDXL base with new adapters, in training mode on the accelerator, and all that they are shown.

    The images are encoded once, and the captions too where the text encoders aren't trained or from the step
    at which they no longer are; what is not needed any more has then left memory.

    Args:
        config: Settings of the run.
        accelerator: Tells the device, the precision, and which share of a batch is this process's.
        samples: The training images.
        class_samples: The images of the class, for prior preservation.
        heldout_samples: The images that are not trained, whose loss is measured.
        encodings: What was encoded before, and needn't be again.
        resuming: The adapters will be read from a checkpoint: spare the work of an initialisation.

    Attributes:
        base: The base; its models carry the adapters.
        trained: `unet`, and `text_encoder` and `text_encoder_2` where they are trained: models with adapters.
        tokens: The new tokens of pivotal tuning, where there are any.
        learning: All models with parameters that are trained: adapters or embeddings of new tokens.
        prompts: Embeddings of all captions and validation prompts, while the text encoders aren't trained.
        objective: Computes the losses of a batch; `wrap` gives it; a wrapper of that may take its place.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        samples: Sequence[Sample],
        class_samples: Sequence[Sample] = (),
        heldout_samples: Sequence[Sample] = (),
        *,
        encodings: Encodings | None = None,
        resuming: bool = False,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        dtype = _PRECISIONS.get(accelerator.mixed_precision, torch.float32)
        self.base = load_base(
            config.pretrained_model_name_or_path,
            dtype=dtype,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
        )
        if not config.quantize_base:
            name = str(dtype).removeprefix("torch.")
            half = "" if dtype.itemsize < 4 else "--mixed_precision bf16 halves it, "
            remedy = f"{half}--quantize_base 4bit keeps a quarter of 16 bits"
            require_room(self.base.unet, accelerator.device, f"the UNet in {name}", remedy)
        self._start = (
            None if resuming or config.lora_weights is None else self._read_start(config.lora_weights)
        )
        self.tokens: NewTokens | None = None
        if config.train_text_encoder_ti:
            base = self.base
            words = new_tokens(config.abstractions, config.num_new_tokens_per_abstraction)
            self.tokens = NewTokens(words, base.tokenizers, base.text_encoders, config.seed)
            samples, heldout_samples = map(self.tokens.captioned, (samples, heldout_samples))
            self.tokens.require_room(samples, config.caption_chunks)
        self.trained: dict[str, nn.Module] = {"unet": self.base.unet}
        self.prompts: PromptCache | None = None
        self._whole_samples = [*class_samples, *heldout_samples]
        text_encoders: dict[str, nn.Module] = {}
        if config.train_text_encoder or config.train_text_encoder_ti:
            text_encoders = dict(zip(TEXT_ENCODERS, self.base.text_encoders, strict=True))
        if config.train_text_encoder:
            self.trained |= text_encoders
        if not config.quantize_base:
            self._add_lora()
        self._encodings = encodings or Encodings()
        self._cache_latents(samples, class_samples, heldout_samples)
        if not text_encoders:
            with self._kept("embeddings of prompts", self.base.text_encoders) as kept:
                self._cache_prompts(kept)
        self.learning = self.trained | text_encoders
        self._wrapped = self.learning
        self.objective: nn.Module = _Objective(self._wrapped, self._losses)
        self._add_adapters(resuming)

    def wrap(self) -> nn.Module:
        """Give the models the accelerator's precision; the objective with all of them in it."""
        self._wrapped = {
            # Processes are joined around the objective: its models may run several times in one pass.
            name: self.accelerator.prepare_model(model, evaluation_mode=True)
            for name, model in self.learning.items()
        }
        self.objective = _Objective(self._wrapped, self._losses)
        return self.objective

    def in_tokens(self, prompt: str) -> str:
        """The prompt with its new tokens in the place of the words that stand for them."""
        return prompt if self.tokens is None else replace_words(prompt, self.tokens.words)

    def tell_cut_captions(self) -> None:
        """Say which captions and validation prompts are longer than the text encoders read."""
        prompts = [*self.latents.captions.whole, *(sample.caption for sample in self._whole_samples)]
        prompts += map(self.in_tokens, self.config.prompts_to_draw)
        tell_cut(self.base.tokenizers, prompts, self.config.caption_chunks)

    def freeze_text_encoders(self) -> None:
        """Train the text encoders no further; without effect where they aren't trained.

        From here on nothing of theirs changes, by weight decay or momentum either, and they are computed
        without noise and dropout, as at inference: once, for all prompts. Then they leave the accelerator.
        """
        text_encoders = self.base.text_encoders
        if not text_encoders:
            return
        for text_encoder in text_encoders:
            text_encoder.requires_grad_(False).eval()  # an optimizer passes over what has no gradient
        self._cache_prompts()
        for text_encoder in text_encoders:
            text_encoder.to("cpu")  # pyright: ignore[reportArgumentType]
        release()

    def loss(self, micro_step: int) -> Tensor:
        """The loss of this process's share of a micro-batch, with the models as they are."""
        size = self.config.train_batch_size
        first = micro_step * size * self.accelerator.num_processes + self.accelerator.process_index * size
        with self._dropout_randomness(micro_step):
            return self._mean_loss(range(first, first + size))

    def heldout_loss(self) -> float:
        """The mean loss of the held-out images at fixed timesteps and noise, without noise on the weights."""
        levels = self.base.noise_scheduler.config["num_train_timesteps"]
        timesteps = fixed_timesteps(levels, HELDOUT_TIMESTEPS)
        with evaluating(self.learning.values()):
            losses = [
                self._losses(batch).mean().item() for batch in self.heldout_latents.fixed_batches(timesteps)
            ]
        return sum(losses) / len(losses)

    def _cache_latents(
        self,
        samples: Sequence[Sample],
        class_samples: Sequence[Sample],
        heldout_samples: Sequence[Sample],
    ) -> None:
        """Encode every image; the VAE then leaves the accelerator, and memory where nothing will be drawn."""
        config, vae = self.config, self.base.vae
        assert vae is not None, "it leaves memory with this call at the earliest"

        def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
            # In float32, as it was loaded, whatever the run's precision: as in the diffusers script. One by
            # one: in batches results would depend on what else is in them, and on CPUs it takes longer.
            vae.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
            latents = encode_images(vae, pixels)
            return latents.mean, latents.std

        hidden = not self.accelerator.is_local_main_process

        def cache(
            samples: Sequence[Sample], seed: int, framing: Framing, captioning: Captioning = AS_THEY_ARE
        ) -> LatentCache:
            return LatentCache(
                samples,
                lambda pixels: Latents(*kept.get([pixels], partial(encode, pixels))),
                framing,
                seed,
                self.base.noise_scheduler.config["num_train_timesteps"],
                captioning=captioning,
                batch_size=config.train_batch_size,
                noise_offset=config.noise_offset,
                perturbation=config.ip_noise_gamma,
                background_weight=config.alpha_background_weight if config.alpha_mask else None,
                progress=lambda samples: tqdm(samples, "caching latents", unit="image", disable=hidden),
            )

        framing = Framing(
            resolution=config.resolution,
            aspect_buckets=config.aspect_buckets,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            interpolation=config.image_interpolation_mode,
            background=parse_background(config.background),
        )
        captioning = Captioning(config.caption_dropout_rate, config.shuffle_caption, config.keep_tokens)
        with self._kept("latents of images", [vae]) as kept:
            self.latents = cache(samples, config.seed, framing, captioning)
            class_seed = hash64(config.seed, "class")
            self.class_latents = cache(class_samples, class_seed, framing) if class_samples else None
            if heldout_samples:
                background = framing.background or WHITE
                fixed = dataclasses.replace(
                    framing, center_crop=True, random_flip=False, background=background
                )
                # The noise does not depend on the run's seed: the loss of all runs is over the same noise.
                self.heldout_latents = cache(heldout_samples, 0, fixed)
        vae.to("cpu")  # pyright: ignore[reportArgumentType]
        if not config.prompts_to_draw:
            self.base.vae = None
        release()

    def _kept(self, what: str, models: Sequence[nn.Module]) -> EncodingsOf:
        """What these models have encoded before; of the processes of a machine one writes what is new."""
        accelerator = self.accelerator
        return self._encodings.of(what, models, accelerator.device, writes=accelerator.is_local_main_process)

    def _cache_prompts(self, kept: EncodingsOf | None = None) -> None:
        """Encode every caption and what validation needs; the text encoders are then dropped."""
        base = self.base
        whole = [sample.caption for sample in self._whole_samples]
        prompts = [
            *self.latents.captions.prompts,
            *whole,
            *map(self.in_tokens, self.config.prompts_to_draw),
            "",
        ]
        self.prompts = PromptCache(
            base.tokenizers,
            base.text_encoders,
            prompts,
            chunks=self.config.caption_chunks,
            kept=kept,
            device=self.accelerator.device,
        )
        base.text_encoders = ()
        release()

    def _add_lora(self) -> None:
        """New adapters, where that can be before anything is encoded: --lora_weights must fit them."""
        config = self.config
        add_lora(
            self.trained,
            rank=config.rank,
            alpha=config.lora_alpha,
            seed=config.seed,
            unet_targets=parse_layers(config.lora_layers or UNET_TARGETS),
            init_lora_weights="gaussian" if config.init_lora_weights == "gaussian" else True,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
        if self._start is not None:
            require_layers(self.trained, self._start, str(config.lora_weights))

    def _add_adapters(self, resuming: bool) -> None:
        config = self.config
        if config.quantize_base:
            quantize(self.base.unet, config.quantize_base, self.accelerator.device)
            compute_dequantized(self.base.unet)
            release()
            self._add_lora()
        for model in self.learning.values():
            if config.gradient_checkpointing:
                enable_gradient_checkpointing(model)
            model.to(self.accelerator.device).train()
        check(self.trained, config.init_lora_weights)
        if self._start is not None:
            load_adapter_tensors(self.trained, self._start)
            self._start = None
        elif not resuming:
            initialise(
                self.trained,
                config.init_lora_weights,
                seed=config.seed,
                batch_size=config.train_batch_size,
                loss=self._shared_loss,
            )
        if config.starts_with_update:
            subtract_initial_update(self.trained)

    def _read_start(self, path: str) -> dict[str, Tensor]:
        """The tensors of --lora_weights, before anything is encoded."""
        config, base = self.config, self.base
        widths = {
            part: model.config.hidden_size
            for part, model in zip(TEXT_ENCODERS, base.text_encoders, strict=True)
        }
        return read_start(
            Path(path),
            rank=None if config.has_own_ranks else config.rank,
            scale=config.scale,
            dora=config.use_dora,
            parts=("unet", *TEXT_ENCODERS) if config.train_text_encoder else ("unet",),
            layers_per_block=base.unet.config["layers_per_block"],
            widths=widths,
        )

    def _shared_loss(self, micro_step: int) -> Tensor:
        """As `loss` before the models are wrapped, and the same in all processes."""
        size = self.config.train_batch_size
        with self._dropout_randomness(micro_step), self.accelerator.autocast():
            return self._mean_loss(range(micro_step * size, (micro_step + 1) * size))

    def _mean_loss(self, positions: range) -> Tensor:
        """The mean loss of the samples at these positions of the stream, with that of class images."""
        batch = self.latents.batch(positions)
        if self.class_latents is None:
            return self.objective(batch).mean()
        losses = self.objective(batch.joined(self.class_latents.batch(positions)))
        size = len(positions)
        return losses[:size].mean() + self.config.prior_loss_weight * losses[size:].mean()

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each sample with the models as they are."""
        if self.prompts is not None:
            prompts = self.prompts.embed(batch.captions)
        else:
            encoders = [self._wrapped[name] for name in TEXT_ENCODERS]
            tokenizers, chunks = self.base.tokenizers, self.config.caption_chunks
            prompts = encode_prompts(tokenizers, encoders, batch.captions, chunks)
        if self.config.quantize_base:
            # Layers of bitsandbytes keep the dtype of their input, also under autocast: begin in the base's.
            dtype = self.base.unet.conv_in.weight.dtype
            prompts = PromptEmbeds(prompts.tokens.to(dtype), prompts.pooled.to(dtype))
        device = self.accelerator.device
        return diffusion_losses(
            self._wrapped["unet"],
            self.base.noise_scheduler,
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            PromptEmbeds(prompts.tokens.to(device), prompts.pooled.to(device)),
            batch.time_ids.to(device),
            self.config.snr_gamma,
            None if batch.weights is None else batch.weights.to(device),
            None if batch.perturbation is None else batch.perturbation.to(device),
        )

    @contextlib.contextmanager
    def _dropout_randomness(self, micro_step: int) -> Iterator[None]:
        """LoRA dropout draws from the global RNG: give it a state that is a function of the micro-batch."""
        if not self.config.lora_dropout:
            yield
            return
        key = hash64(self.config.seed, "dropout", micro_step, self.accelerator.process_index)
        with seeded(self.accelerator.device, key):
            yield
