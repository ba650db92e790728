"""One training run: the loop, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm import tqdm

from flatlora_diffusion import data, kohya, record, sdxl
from flatlora_diffusion.cache import Batch, LatentCache, PromptCache
from flatlora_diffusion.checkpoint import (
    Checkpoint,
    Stored,
    find_checkpoint,
    flatten_optimizer,
    newest_checkpoint,
    optimizer_numbers,
    restore_optimizer,
    write_checkpoint,
)
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.errors import RunInterruptedError, UserError
from flatlora_diffusion.export import WEIGHTS_NAME, adapter_bytes, load_adapter_tensors, write_atomically
from flatlora_diffusion.generate import release
from flatlora_diffusion.interrupt import StopRequest, stop_request
from flatlora_diffusion.noise import hash64
from flatlora_diffusion.optimizers import make_optimizer, parameter_groups
from flatlora_diffusion.perturb import FlatLoRA
from flatlora_diffusion.validate import draw_validation, report_validation

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"  # as the diffusers script calls it
HELDOUT_TIMESTEPS = 8


class Run:
    """One training run with one method.

    Args:
        config: Its settings.
        samples: The training images.
        class_samples: The images of the class, for prior preservation.
        heldout_samples: The images that are not trained, whose loss is logged.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: list[data.Sample],
        class_samples: Sequence[data.Sample] = (),
        heldout_samples: Sequence[data.Sample] = (),
    ) -> None:
        self.config = config
        self.samples = samples
        self.class_samples = class_samples
        self.heldout_samples = heldout_samples
        self.output = Path(config.output_dir)
        self.accelerator = _make_accelerator(config)
        world = self.accelerator.num_processes
        self.global_batch = config.train_batch_size * world
        samples_a_step = self.global_batch * config.gradient_accumulation_steps
        samples_an_epoch = max(len(samples) * config.repeats, len(class_samples))
        self.steps_an_epoch = math.ceil(samples_an_epoch / samples_a_step)
        self.total_steps = config.max_train_steps or config.num_train_epochs * self.steps_an_epoch
        self.settings = record.deciding_settings(
            config, self.total_steps, data.digest([*samples, *class_samples]), self.accelerator
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.heldout_losses: dict[int, float] = {}

    def train(self) -> None:
        """Train, or go on from a checkpoint; leave the adapter and the summary in the output folder."""
        config = self.config
        resuming = config.resume_from_checkpoint == "latest"
        if resuming and record.is_complete(self.output, self.settings, self.total_steps):
            logger.info("%s is complete already", self.output)
            return
        stored = None
        if config.resume_from_checkpoint:
            with self.accelerator.main_process_first():  # it removes what a killed run left unfinished
                stored = find_checkpoint(self.output, config.resume_from_checkpoint, self.settings)
            if stored is None:
                logger.info("no checkpoint in %s yet; starting from the beginning", self.output)
        self._prepare()
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        start = self._resume(stored) if stored else 0
        self._start_trackers()
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with stop_request() as stop:
                self._loop(start, stop)
            self._finish()
        finally:
            self.flat.remove()
            self.accelerator.end_training()

    # Preparation: what a run holds in memory.

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        precisions = {"fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = precisions.get(accelerator.mixed_precision, torch.float32)
        self.base = sdxl.load_base(
            config.pretrained_model_name_or_path,
            dtype=dtype,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
        )
        self._cache_latents(dtype)
        self.trained: dict[str, nn.Module] = {"unet": self.base.unet}
        self.prompts: PromptCache | None = None
        if config.train_text_encoder:
            self.trained |= dict(zip(sdxl.TEXT_ENCODERS, self.base.text_encoders, strict=True))
        else:
            self._cache_prompts()
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
            model.to(accelerator.device).train()
        self.flat = FlatLoRA(
            list(self.trained.values()),
            sigma=config.flat_sigma,
            total_steps=self.total_steps,
            schedule=config.flat_schedule,
            noise=config.flat_noise,
            seed=config.seed,
        )
        lr_factor = self.global_batch * config.gradient_accumulation_steps if config.scale_lr else 1
        self.optimizer = make_optimizer(parameter_groups(self.trained, config, lr_factor), config)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.total_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        # The learning rate's schedule counts optimizer steps, so it isn't handed to accelerate, which would
        # step it once for every process.
        self.prepared = {name: accelerator.prepare(model) for name, model in self.trained.items()}
        self.prepared_optimizer = accelerator.prepare(self.optimizer)

    def _cache_latents(self, dtype: torch.dtype) -> None:
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

        self.latents = cache(self.samples, config.seed)
        self.class_latents = None
        if self.class_samples:
            self.class_latents = cache(self.class_samples, hash64(config.seed, "class"))
        if self.heldout_samples:
            whole = dataclasses.replace(config, center_crop=True, random_flip=False)
            # The noise does not depend on the run's seed: the loss of all runs is over the same noise.
            self.heldout_latents = cache(self.heldout_samples, 0, whole)
        vae.to("cpu")
        if not config.validation_prompt:
            self.base.vae = None
        release()

    def _cache_prompts(self) -> None:
        """Encode every caption and what validation needs; the text encoders are then dropped."""
        base = self.base
        for text_encoder in base.text_encoders:
            text_encoder.to(self.accelerator.device)
        samples = [*self.samples, *self.class_samples, *self.heldout_samples]
        captions = [sample.caption for sample in samples]
        prompts = [*captions, *(self.config.validation_prompt or ()), ""]
        self.prompts = PromptCache(base.tokenizers, base.text_encoders, prompts)
        base.text_encoders = ()
        release()

    def _start_trackers(self) -> None:
        settings = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in dataclasses.asdict(self.config).items()
        }
        self.accelerator.init_trackers("dreambooth-flat-lora", config=settings)

    # The loop.

    def _loop(self, start: int, stop: StopRequest) -> None:
        config, accelerator = self.config, self.accelerator
        progress = tqdm(
            total=self.total_steps,
            initial=start,
            desc=record.method(config),
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        with progress:
            for step in range(start, self.total_steps):
                began = time.perf_counter()
                sigma, lr = self.flat.sigma_t, self.lr_scheduler.get_last_lr()[0]
                loss, stopping = self._optimizer_step(step, stop)
                self.lr_scheduler.step()
                self.flat.step()
                self.losses.append(loss)
                self.seconds.append(time.perf_counter() - began)
                done = step + 1
                progress.set_postfix(loss=f"{loss:.4f}", sigma=f"{sigma:.3f}", lr=f"{lr:.1e}")
                progress.update()
                accelerator.log({"loss": loss, "sigma": sigma, "lr": lr}, step=done)
                if self.heldout_samples and (done % config.heldout_steps == 0 or done == self.total_steps):
                    self._measure_heldout(done)
                if done % config.checkpointing_steps == 0:
                    self._save_checkpoint(done)
                if stopping:
                    self._interrupt(done, stop)
                if self._validates_after(done):
                    self._validate(done)

    def _optimizer_step(self, step: int, stop: StopRequest) -> tuple[float, bool]:
        """One optimizer step: the mean loss of its samples, and whether to stop after it."""
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(*self.prepared.values()):
                micro_step = step * config.gradient_accumulation_steps + micro
                with self._dropout_randomness(micro_step):
                    loss = self._loss(micro_step)
                accelerator.backward(loss)
                total += loss.detach() / config.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    # All processes stop together, or none: their flags travel with the loss.
                    flags = torch.stack(
                        [total, torch.full_like(total, float(stop.signal_number is not None))]
                    )
                    mean_loss, stopping = accelerator.reduce(flags, reduction="mean").tolist()
                    if not math.isfinite(mean_loss):
                        raise UserError(self._divergence(step, f"the loss became {mean_loss}"))
                    parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                    norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    # With a gradient scaler (fp16) such a step is skipped and the scale lowered.
                    if accelerator.scaler is None and not math.isfinite(norm):
                        raise UserError(self._divergence(step, f"the gradient's norm became {float(norm)}"))
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
        return mean_loss, stopping > 0

    def _loss(self, micro_step: int) -> Tensor:
        """The loss of this process's share of a micro-batch."""
        size = self.config.train_batch_size
        first = micro_step * self.global_batch + self.accelerator.process_index * size
        positions = range(first, first + size)
        batch = self.latents.batch(positions)
        if self.class_latents is None:
            return self._losses(batch).mean()
        losses = self._losses(batch.joined(self.class_latents.batch(positions)))
        return losses[:size].mean() + self.config.prior_loss_weight * losses[size:].mean()

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each sample with the models as they are."""
        if self.prompts is not None:
            prompts = self.prompts.embed(batch.captions)
        else:
            encoders = [self.prepared[name] for name in sdxl.TEXT_ENCODERS]
            prompts = sdxl.encode_prompts(self.base.tokenizers, encoders, batch.captions)
        device = self.accelerator.device
        return sdxl.diffusion_losses(
            self.prepared["unet"],
            self.base.noise_scheduler,
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            sdxl.PromptEmbeds(prompts.tokens.to(device), prompts.pooled.to(device)),
            batch.time_ids.to(device),
            self.config.snr_gamma,
        )

    def _measure_heldout(self, step: int) -> None:
        """The mean loss of the held-out images at fixed timesteps and noise, with the adapter as it is."""
        if self.accelerator.is_main_process:
            levels = self.base.noise_scheduler.config.num_train_timesteps
            timesteps = [round((k + 0.5) * levels / HELDOUT_TIMESTEPS) for k in range(HELDOUT_TIMESTEPS)]
            with sdxl.evaluating(self.trained.values()):
                losses = [
                    self._losses(batch).mean().item()
                    for batch in self.heldout_latents.fixed_batches(timesteps)
                ]
            self.heldout_losses[step] = sum(losses) / len(losses)
            self.accelerator.log({"heldout_loss": self.heldout_losses[step]}, step=step)
        self.accelerator.wait_for_everyone()

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

    def _divergence(self, step: int, what: str) -> str:
        newest = newest_checkpoint(self.output)
        kept = f"{newest} is sound" if newest else "no checkpoint had been written"
        return (
            f"{what} at step {step + 1} and nothing was updated with it ({kept}); "
            "lower --learning_rate, or use bf16 instead of fp16"
        )

    # Checkpoints and results.

    def _save_checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            scalars = {
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "losses": self.losses,
                "heldout_losses": self.heldout_losses,
            }
            if self.accelerator.scaler is not None:
                scalars["scaler"] = self.accelerator.scaler.state_dict()
            scalars["optimizer"] = optimizer_numbers(self.optimizer)
            optimizer = flatten_optimizer(self.optimizer)
            checkpoint = Checkpoint(step, self._adapter(step), optimizer, self.settings, scalars)
            write_checkpoint(self.output, checkpoint, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self, stored: Stored) -> int:
        load_adapter_tensors(self.trained, stored.adapter())
        restore_optimizer(self.optimizer, stored.optimizer(), stored.scalars["optimizer"])
        self.lr_scheduler.load_state_dict(stored.scalars["lr_scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(stored.scalars["scaler"])
        self.flat.global_step = stored.step
        self.losses = list(stored.scalars["losses"])
        self.heldout_losses = {int(k): loss for k, loss in stored.scalars["heldout_losses"].items()}
        logger.info("resuming from %s at step %d of %d", stored.folder, stored.step, self.total_steps)
        return stored.step

    def _interrupt(self, step: int, stop: StopRequest) -> None:
        self._save_checkpoint(step)
        resume = ["--resume_from_checkpoint", "latest"]
        command = shlex.join(sys.argv if sys.argv[-2:] == resume else [*sys.argv, *resume])
        raise RunInterruptedError(
            f"stopped after step {step} of {self.total_steps}, saved {self.output}/checkpoint-{step}; "
            "go on with\n"
            f"  python {command}",
            stop.signal_number or signal.SIGINT,  # another process may have got the signal
        )

    def _finish(self) -> None:
        """Save the adapter before anything else that could fail, then the summary."""
        if self.accelerator.is_main_process:
            write_atomically(self.output / WEIGHTS_NAME, self._adapter(self.total_steps))
            if self.config.output_kohya_format:
                layers = self.base.unet.config.layers_per_block
                kohya.convert(self.output / WEIGHTS_NAME, self.output / KOHYA_NAME, layers)
            report = record.summary(
                self.config,
                self.accelerator,
                len(self.samples),
                self.losses,
                self.seconds,
                self.heldout_losses,
            )
            write_atomically(self.output / SUMMARY, json.dumps(report, indent=2).encode())
            logger.info("saved %s", self.output / WEIGHTS_NAME)
        self.accelerator.wait_for_everyone()

    def _adapter(self, step: int) -> bytes:
        return adapter_bytes(self.trained, record.facts(self.config, self.settings, self.trained, step))

    def _validates_after(self, step: int) -> bool:
        """After the first epoch, and then every so many, as the diffusers script does."""
        config = self.config
        epoch, rest = divmod(step, self.steps_an_epoch)
        if not config.validation_prompt or not config.validation_epochs or rest:
            return False
        return (epoch - 1) % config.validation_epochs == 0

    def _validate(self, step: int) -> None:
        if self.accelerator.is_main_process:
            models = list(self.trained.values())
            pictures = draw_validation(self.base, models, self.prompts, self.config, self.accelerator)
            report_validation(pictures, step, self.output / "validation", self.accelerator)
        self.accelerator.wait_for_everyone()


def _make_accelerator(config: TrainConfig) -> Accelerator:
    tracker = config.report_to if config.report_to not in (None, "none") else None
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        logger.warning("tensorboard isn't installed, so nothing is tracked (pip install tensorboard)")
        tracker = None
    # The first text encoder's last layer never enters the prompt's embedding: no gradient reaches its LoRA.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.train_text_encoder)
    try:
        return Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
            ),
            kwargs_handlers=[unused],
        )
    except (ValueError, ImportError) as error:  # an unknown tracker, a precision that the device lacks
        raise UserError(f"accelerate refuses these settings: {' '.join(str(error).split())}") from error
