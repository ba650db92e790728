"""One training run: the loop, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from flatlora_diffusion import data, kohya, record
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
from flatlora_diffusion.gallery import BASE, FOLDER, Gallery, SideBySide, step_name
from flatlora_diffusion.hub import without_token
from flatlora_diffusion.interrupt import StopRequest, stop_request
from flatlora_diffusion.learner import Learner
from flatlora_diffusion.optimizers import make_optimizer, parameter_groups
from flatlora_diffusion.perturb import FlatLoRA
from flatlora_diffusion.validate import draw_validation, report_validation

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"  # as the diffusers script calls it


class Run:
    """One training run with one method.

    Args:
        config: Its settings.
        samples: The training images.
        class_samples: The images of the class, for prior preservation.
        heldout_samples: The images that are not trained, whose loss is logged.
        side_by_side: Shows the validation pictures of this run and of those that it is compared with.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: list[data.Sample],
        class_samples: Sequence[data.Sample] = (),
        heldout_samples: Sequence[data.Sample] = (),
        side_by_side: SideBySide | None = None,
    ) -> None:
        self.config = config
        self.samples = samples
        self.class_samples = class_samples
        self.heldout_samples = heldout_samples
        self.side_by_side = side_by_side
        self.output = Path(config.output_dir)
        self.accelerator = _make_accelerator(config)
        samples_a_micro_step = config.train_batch_size * self.accelerator.num_processes
        self.samples_a_step = samples_a_micro_step * config.gradient_accumulation_steps
        samples_an_epoch = max(len(samples) * config.repeats, len(class_samples))
        self.steps_an_epoch = math.ceil(samples_an_epoch / self.samples_a_step)
        self.total_steps = config.max_train_steps or config.num_train_epochs * self.steps_an_epoch
        self.settings = record.deciding_settings(
            config, self.total_steps, data.digest([*samples, *class_samples]), self.accelerator
        )
        self.gallery = self._gallery(self.output / FOLDER, len(samples))
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
                self._validate_before(start)
                self._loop(start, stop)
            self._finish()
        finally:
            self.flat.remove()
            self.accelerator.end_training()

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        self.learner = Learner(config, accelerator, self.samples, self.class_samples, self.heldout_samples)
        self.flat = FlatLoRA(
            list(self.learner.trained.values()),
            sigma=config.flat_sigma,
            total_steps=self.total_steps,
            schedule=config.flat_schedule,
            noise=config.flat_noise,
            seed=config.seed,
        )
        lr_factor = self.samples_a_step if config.scale_lr else 1
        self.optimizer = make_optimizer(parameter_groups(self.learner.trained, config, lr_factor), config)
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
        self.wrapped_models = self.learner.prepare()
        self.wrapped_optimizer = accelerator.prepare(self.optimizer)

    def _start_trackers(self) -> None:
        settings = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in self.config.settings().items()
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
            with accelerator.accumulate(*self.wrapped_models):
                loss = self.learner.loss(step * config.gradient_accumulation_steps + micro)
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
                self.wrapped_optimizer.step()
                self.wrapped_optimizer.zero_grad()
        return mean_loss, stopping > 0

    def _measure_heldout(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.heldout_losses[step] = self.learner.heldout_loss()
            self.accelerator.log({"heldout_loss": self.heldout_losses[step]}, step=step)
        self.accelerator.wait_for_everyone()

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
        load_adapter_tensors(self.learner.trained, stored.adapter())
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
        words = without_token(sys.argv)
        command = shlex.join(words if words[-2:] == resume else [*words, *resume])
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
                layers = self.learner.base.unet.config.layers_per_block
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
        trained = self.learner.trained
        return adapter_bytes(trained, record.facts(self.config, self.settings, trained, step))

    def _validates_after(self, step: int) -> bool:
        """After the first epoch, and then every so many, as the diffusers script does."""
        config = self.config
        epoch, rest = divmod(step, self.steps_an_epoch)
        if not config.validation_prompt or not config.validation_epochs or rest:
            return False
        return (epoch - 1) % config.validation_epochs == 0

    def _validate(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self._show(step)
        self.accelerator.wait_for_everyone()

    def _show(self, step: int) -> None:
        pictures = draw_validation(self.learner, self.config)
        if pictures is None:
            return
        report_validation(pictures, step, self.gallery, self.config, self.accelerator)
        if self.side_by_side and self.side_by_side.last == self.gallery.folder:
            self.side_by_side.draw(step)

    def _validate_before(self, start: int) -> None:
        """Draw what an interruption prevented after the last step, or before the first one the base."""
        config = self.config
        if self.accelerator.is_main_process:
            if start and self._validates_after(start) and not self.gallery.has(step_name(start)):
                self._show(start)
            will_validate = config.validation_prompt and config.validation_epochs
            if not start and self.side_by_side and will_validate and self.steps_an_epoch <= self.total_steps:
                self._draw_base(self._gallery(self.side_by_side.folder, 0))
        self.accelerator.wait_for_everyone()

    def _draw_base(self, gallery: Gallery) -> None:
        """Draw with an adapter that was not trained yet, which changes nothing."""
        if not gallery.has(BASE) and (pictures := draw_validation(self.learner, self.config)):
            gallery.write(pictures, BASE, "The base")

    def _gallery(self, folder: Path, images: int) -> Gallery:
        return Gallery(folder, self.config, self.accelerator.mixed_precision, images)


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
