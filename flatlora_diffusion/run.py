"""One training run: the loop, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion import data, kohya, record
from flatlora_diffusion.checkpoint import (
    OPTIMIZER_NAME,
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
from flatlora_diffusion.ema import AdapterAverage
from flatlora_diffusion.errors import RunInterruptedError, UserError
from flatlora_diffusion.export import (
    LIVE_NAME,
    WEIGHTS_NAME,
    adapter_bytes,
    load_adapter_tensors,
    write_atomically,
)
from flatlora_diffusion.gallery import BASE, FOLDER, Gallery, SideBySide, step_name
from flatlora_diffusion.hub import without_token
from flatlora_diffusion.interrupt import StopRequest, stop_request
from flatlora_diffusion.launch import from_main, make_accelerator, require_same
from flatlora_diffusion.learner import Learner
from flatlora_diffusion.norms import UpdateNorms
from flatlora_diffusion.optimizers import make_optimizer, parameter_groups
from flatlora_diffusion.perturb import FlatLoRA
from flatlora_diffusion.pivotal import EMBEDDINGS_NAME, FACTS_KEY
from flatlora_diffusion.updates import make_updates
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
        self.accelerator = make_accelerator(config)
        samples_a_micro_step = config.train_batch_size * self.accelerator.num_processes
        self.samples_a_step = samples_a_micro_step * config.gradient_accumulation_steps
        samples_an_epoch = max(len(samples) * config.repeats, len(class_samples))
        self.steps_an_epoch = math.ceil(samples_an_epoch / self.samples_a_step)
        self.total_steps = config.max_train_steps or config.num_train_epochs * self.steps_an_epoch
        self.text_encoder_steps = config.text_encoder_steps(self.total_steps)
        self.settings = record.deciding_settings(
            config, self.total_steps, data.digest([*samples, *class_samples]), self.accelerator
        )
        require_same(self.settings)
        self.gallery = self._gallery(self.output / FOLDER)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.heldout_losses: dict[int, float] = {}

    def train(self) -> None:
        """Train, or go on from a checkpoint; leave the adapter and the summary in the output folder."""
        config = self.config
        resuming = config.resume_from_checkpoint == "latest"
        if resuming and from_main(lambda: record.is_complete(self.output, self.settings, self.total_steps)):
            logger.info("%s is complete already", self.output)
            return
        stored = None
        if config.resume_from_checkpoint:
            # Other machines may not see the main process's disk.
            stored = from_main(
                lambda: find_checkpoint(self.output, config.resume_from_checkpoint, self.settings)
            )
            if stored is None:
                logger.info("no checkpoint in %s yet; starting from the beginning", self.output)
        self._prepare(resuming=stored is not None)
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
                if stop.signal_number is not None:  # it came while the adapter was being saved
                    self._stop(f"saved {self.output / WEIGHTS_NAME}", stop)
        finally:
            self.flat.remove()
            self.updates.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _prepare(self, resuming: bool) -> None:
        config, accelerator = self.config, self.accelerator
        self.learner = Learner(
            config,
            accelerator,
            self.samples,
            self.class_samples,
            self.heldout_samples,
            resuming=resuming,
        )
        trained = self.learner.trained.values()
        self.average = AdapterAverage(trained, config.ema_decay) if config.use_ema else None
        self.norms = UpdateNorms(trained)
        self.flat = FlatLoRA(
            list(self.learner.trained.values()),
            sigma=config.flat_sigma,
            total_steps=self.total_steps,
            schedule=config.flat_schedule,
            noise=config.flat_noise,
            seed=config.seed,
        )
        lr_factor = self.samples_a_step if config.scale_lr else 1
        self.optimizer = make_optimizer(parameter_groups(self.learner.learning, config, lr_factor), config)
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
        self.updates = make_updates(accelerator, self.learner.prepare(), self.optimizer, config)
        self.learner.objective = self.updates.model

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
                if step >= self.text_encoder_steps:
                    self.learner.freeze_text_encoders()
                sigma, lr = self.flat.sigma_t, self.lr_scheduler.get_last_lr()[0]
                loss, stopping = self._optimizer_step(step, stop)
                self.lr_scheduler.step()
                norms = self._limit_norms()
                if self.average:
                    self.average.step()
                self.flat.step()
                self.losses.append(loss)
                self.seconds.append(time.perf_counter() - began)
                done = step + 1
                progress.set_postfix(loss=f"{loss:.4f}", sigma=f"{sigma:.3f}", lr=f"{lr:.1e}")
                progress.update()
                accelerator.log({"loss": loss, "sigma": sigma, "lr": lr, **norms}, step=done)
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
        micro_steps = config.gradient_accumulation_steps
        for micro in range(micro_steps):
            with self.updates.accumulating(last=micro + 1 == micro_steps):
                loss = self.learner.loss(step * micro_steps + micro)
                self.updates.backward(loss)
            total += loss.detach() / micro_steps
        # All processes stop together, or none: their flags travel with the loss.
        flags = torch.stack([total, torch.full_like(total, float(stop.signal_number is not None))])
        mean_loss, stopping = accelerator.reduce(flags, reduction="mean").tolist()
        if not math.isfinite(mean_loss):
            raise UserError(self._divergence(step, f"the loss became {mean_loss}"))
        norm = self.updates.step()
        # With a gradient scaler (fp16) such a step is skipped and the scale lowered.
        if accelerator.scaler is None and not math.isfinite(norm):
            raise UserError(self._divergence(step, f"the gradient's norm became {norm}"))
        if self.learner.tokens is not None:
            self.learner.tokens.keep_scale()
        return mean_loss, stopping > 0

    def _limit_norms(self) -> dict[str, float]:
        """Apply --scale_weight_norms; what the tracker is told of the updates' norms."""
        if self.config.scale_weight_norms:
            norms, scaled = self.norms.limit(self.config.scale_weight_norms)
            limited = {"max_norm/keys_scaled": scaled, "max_norm/max_key_norm": norms.max().item()}
            return {"update_norm": norms.mean().item(), **limited}
        return {"update_norm": self.norms.measure().mean().item()} if self.accelerator.trackers else {}

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The models as they are saved and judged: with --use_ema the average in place of the adapter."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def _measure_heldout(self, step: int) -> None:
        if self.accelerator.is_main_process:
            with self._averaged():
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
        whole = self.updates.whole_optimizer()
        if self.accelerator.is_main_process:
            scalars = {
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "losses": self.losses,
                "heldout_losses": self.heldout_losses,
            }
            if self.accelerator.scaler is not None:
                scalars["scaler"] = self.accelerator.scaler.state_dict()
            scalars["optimizer"] = optimizer_numbers(whole)
            optimizer = flatten_optimizer(whole)
            adapter, others = self._files(step)
            checkpoint = Checkpoint(step, adapter, optimizer, self.settings, scalars, others)
            write_checkpoint(self.output, checkpoint, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self, stored: Stored) -> int:
        def tensors(name: str) -> dict[str, Tensor]:
            return from_main(lambda: stored.tensors(name))

        load_adapter_tensors(self.learner.trained, tensors(WEIGHTS_NAME))
        if self.average:
            self.average.resume(stored.step)
            load_adapter_tensors(self.learner.trained, tensors(LIVE_NAME))
        if self.learner.tokens is not None:
            self.learner.tokens.load(tensors(EMBEDDINGS_NAME))
        whole = self.updates.whole_optimizer()
        restore_optimizer(whole, tensors(OPTIMIZER_NAME), stored.scalars["optimizer"])
        self.updates.adopt(whole)
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
        saved = f"{self.output}/checkpoint-{step}"
        self._stop(f"stopped after step {step} of {self.total_steps}, saved {saved}", stop)

    def _stop(self, what: str, stop: StopRequest) -> NoReturn:
        resume = ["--resume_from_checkpoint", "latest"]
        words = without_token(sys.argv)
        command = shlex.join(words if words[-2:] == resume else [*words, *resume])
        how = f"\n  python {command}"
        if self.accelerator.num_processes > 1:  # the launcher's own words aren't known here
            how = f" the same launcher and\n  {command}"
        raise RunInterruptedError(
            f"{what}; go on with{how}",
            stop.signal_number or signal.SIGINT,  # another process may have got the signal
        )

    def _finish(self) -> None:
        """Save the adapter before anything else that could fail, then the summary."""
        if self.accelerator.is_main_process:
            adapter, others = self._files(self.total_steps)
            # The adapter comes last: its file says that the run is complete.
            for name, content in others.items():
                write_atomically(self.output / name, content)
            write_atomically(self.output / WEIGHTS_NAME, adapter)
            if self.config.output_kohya_format:
                layers = self.learner.base.unet.config.layers_per_block
                kohya.convert(self.output / WEIGHTS_NAME, self.output / KOHYA_NAME, layers)
            with self._averaged():
                norms = self.norms.measure().tolist()
            if not any(norms) and not self.config.use_dora:  # a DoRA also has magnitudes
                logger.warning(
                    "the adapter has no effect: every update B@A is exactly 0; raise --learning_rate"
                )
            report = record.summary(
                self.config,
                self.accelerator,
                len(self.samples),
                self.losses,
                self.seconds,
                self.heldout_losses,
                norms,
            )
            write_atomically(self.output / SUMMARY, json.dumps(report, indent=2).encode())
            logger.info("saved %s", self.output / WEIGHTS_NAME)
        self.accelerator.wait_for_everyone()

    def _files(self, step: int) -> tuple[bytes, dict[str, bytes]]:
        """The adapter's file, with --use_ema that of the average, and the files beside it by name."""
        tokens = self.learner.tokens
        others = {} if tokens is None else {EMBEDDINGS_NAME: tokens.file()}
        if not self.average:
            return self._adapter(step), others
        others[LIVE_NAME] = self._adapter(step)
        with self.average.applied():
            return self._adapter(step, averaged=True), others

    def _adapter(self, step: int, averaged: bool = False) -> bytes:
        trained = self.learner.trained
        facts = record.facts(self.config, self.settings, trained, step, averaged)
        if self.learner.tokens is not None:
            facts[FACTS_KEY] = self.learner.tokens.facts()
        return adapter_bytes(trained, facts)

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
        with self._averaged():
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
                self._draw_base(self._gallery(self.side_by_side.folder))
        self.accelerator.wait_for_everyone()

    def _draw_base(self, gallery: Gallery) -> None:
        """Draw with an adapter that was not trained yet, which changes nothing."""
        if not gallery.has(BASE) and (pictures := draw_validation(self.learner, self.config)):
            gallery.write(pictures, BASE, "The base")

    def _gallery(self, folder: Path) -> Gallery:
        return Gallery(folder, self.config, self.accelerator.mixed_precision, len(self.samples))
