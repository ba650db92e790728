"""What a run trains: the base with its adapters, what they are shown, and their loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from flatlora_diffusion import data, sdxl
from flatlora_diffusion.cache import Batch, LatentCache, PromptCache
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.generate import release
from flatlora_diffusion.noise import hash64

HELDOUT_TIMESTEPS = 8

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

    The images are encoded once, and the captions too where the text encoders aren't trained; what is not
    needed any more has then left memory.

    Args:
        config: Settings of the run.
        accelerator: Tells the device, the precision, and which share of a batch is this process's.
        samples: The training images.
        class_samples: The images of the class, for prior preservation.
        heldout_samples: The images that are not trained, whose loss is measured.

    Attributes:
        base: The base; its models carry the adapters.
        trained: `unet`, and `text_encoder` and `text_encoder_2` where they are trained.
        prompts: Embeddings of all captions and validation prompts, where the text encoders aren't trained.
        objective: Computes the losses of a batch; `prepare` gives it, and what wraps it may take its place.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        samples: Sequence[data.Sample],
        class_samples: Sequence[data.Sample] = (),
        heldout_samples: Sequence[data.Sample] = (),
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        dtype = _PRECISIONS.get(accelerator.mixed_precision, torch.float32)
        self.base = sdxl.load_base(
            config.pretrained_model_name_or_path,
            dtype=dtype,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
        )
        self._cache_latents(dtype, samples, class_samples, heldout_samples)
        self.trained: dict[str, nn.Module] = {"unet": self.base.unet}
        self.prompts: PromptCache | None = None
        if config.train_text_encoder:
            self.trained |= dict(zip(sdxl.TEXT_ENCODERS, self.base.text_encoders, strict=True))
        else:
            self._cache_prompts([*samples, *class_samples, *heldout_samples])
        self._add_adapters()
        self._wrapped = self.trained
        self.objective: nn.Module = _Objective(self._wrapped, self._losses)

    def prepare(self) -> nn.Module:
        """Give the models the accelerator's precision; the objective with all of them in it."""
        self._wrapped = {
            # Processes are joined around the objective: its models may run several times in one pass.
            name: self.accelerator.prepare_model(model, evaluation_mode=True)
            for name, model in self.trained.items()
        }
        self.objective = _Objective(self._wrapped, self._losses)
        return self.objective

    def loss(self, micro_step: int) -> Tensor:
        """The loss of this process's share of a micro-batch, with the models as they are."""
        size = self.config.train_batch_size
        first = micro_step * size * self.accelerator.num_processes + self.accelerator.process_index * size
        positions = range(first, first + size)
        batch = self.latents.batch(positions)
        with self._dropout_randomness(micro_step):
            if self.class_latents is None:
                return self.objective(batch).mean()
            losses = self.objective(batch.joined(self.class_latents.batch(positions)))
            return losses[:size].mean() + self.config.prior_loss_weight * losses[size:].mean()

    def heldout_loss(self) -> float:
        """The mean loss of the held-out images at fixed timesteps and noise, without noise on the weights."""
        levels = self.base.noise_scheduler.config.num_train_timesteps
        timesteps = [round((k + 0.5) * levels / HELDOUT_TIMESTEPS) for k in range(HELDOUT_TIMESTEPS)]
        with sdxl.evaluating(self.trained.values()):
            losses = [
                self._losses(batch).mean().item() for batch in self.heldout_latents.fixed_batches(timesteps)
            ]
        return sum(losses) / len(losses)

    def _cache_latents(
        self,
        dtype: torch.dtype,
        samples: Sequence[data.Sample],
        class_samples: Sequence[data.Sample],
        heldout_samples: Sequence[data.Sample],
    ) -> None:
        """Encode every image; the VAE then leaves the accelerator, and memory where nothing will be drawn."""
        config, vae = self.config, self.base.vae
        # The base's own VAE overflows in half precision; one that the user chose is trusted to work in it.
        vae.to(self.accelerator.device, dtype if config.pretrained_vae_model_name_or_path else torch.float32)
        hidden = not self.accelerator.is_local_main_process

        def cache(samples: Sequence[data.Sample], seed: int, config: TrainConfig = config) -> LatentCache:
            return LatentCache(
                samples,
                lambda pixels: sdxl.encode_images(vae, pixels),
                config,
                seed,
                self.base.noise_scheduler.config.num_train_timesteps,
                progress=lambda samples: tqdm(samples, "caching latents", unit="image", disable=hidden),
            )

        self.latents = cache(samples, config.seed)
        self.class_latents = cache(class_samples, hash64(config.seed, "class")) if class_samples else None
        if heldout_samples:
            whole = dataclasses.replace(config, center_crop=True, random_flip=False)
            # The noise does not depend on the run's seed: the loss of all runs is over the same noise.
            self.heldout_latents = cache(heldout_samples, 0, whole)
        vae.to("cpu")
        if not config.validation_prompt:
            self.base.vae = None
        release()

    def _cache_prompts(self, samples: Sequence[data.Sample]) -> None:
        """Encode every caption and what validation needs; the text encoders are then dropped."""
        base = self.base
        for text_encoder in base.text_encoders:
            text_encoder.to(self.accelerator.device)
        captions = [sample.caption for sample in samples]
        prompts = [*captions, *(self.config.validation_prompt or ()), ""]
        self.prompts = PromptCache(base.tokenizers, base.text_encoders, prompts)
        base.text_encoders = ()
        release()

    def _add_adapters(self) -> None:
        config = self.config
        sdxl.add_lora(
            self.trained,
            rank=config.rank,
            alpha=config.alpha,
            seed=config.seed,
            unet_targets=config.lora_layers or sdxl.UNET_TARGETS,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
        for model in self.trained.values():
            if config.gradient_checkpointing:
                sdxl.enable_gradient_checkpointing(model)
            model.to(self.accelerator.device).train()

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each sample with the models as they are."""
        if self.prompts is not None:
            prompts = self.prompts.embed(batch.captions)
        else:
            encoders = [self._wrapped[name] for name in sdxl.TEXT_ENCODERS]
            prompts = sdxl.encode_prompts(self.base.tokenizers, encoders, batch.captions)
        device = self.accelerator.device
        return sdxl.diffusion_losses(
            self._wrapped["unet"],
            self.base.noise_scheduler,
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            sdxl.PromptEmbeds(prompts.tokens.to(device), prompts.pooled.to(device)),
            batch.time_ids.to(device),
            self.config.snr_gamma,
        )

    @contextlib.contextmanager
    def _dropout_randomness(self, micro_step: int) -> Iterator[None]:
        """LoRA dropout draws from the global RNG: give it a state that is a function of the micro-batch."""
        if not self.config.lora_dropout:
            yield
            return
        device = self.accelerator.device
        key = hash64(self.config.seed, "dropout", micro_step, self.accelerator.process_index)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(key)
            yield
