"""One training run: the loop, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.command import invoked_as, shell_line
from flatlora_diffusion.common.devices import if_memory_lasts, out_of_memory_as_error
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.common.signals import StopRequest, stop_request
from flatlora_diffusion.config.command_line import unabbreviated
from flatlora_diffusion.config.settings import FLAT, TrainConfig
from flatlora_diffusion.data.encodings import Encodings
from flatlora_diffusion.data.images import Sample, digest
from flatlora_diffusion.output.checkpoint import find_checkpoint, newest_checkpoint, write_checkpoint
from flatlora_diffusion.output.folds import Folds
from flatlora_diffusion.output.gallery import SideBySide
from flatlora_diffusion.output.going_on import require_steps_left
from flatlora_diffusion.output.hub import without_token
from flatlora_diffusion.output.names import FOLDER, LIVE_HELDOUT, SUMMARY
from flatlora_diffusion.output.record import deciding_settings, is_complete
from flatlora_diffusion.train.bar import StepBar
from flatlora_diffusion.train.best import is_worse, stopped_at
from flatlora_diffusion.train.callbacks import Callback, TrainingRun
from flatlora_diffusion.train.leaner import leaner
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.processes import from_main, make_accelerator, require_same
from flatlora_diffusion.train.saving import save
from flatlora_diffusion.train.state import TrainingState
from flatlora_diffusion.train.tracking import PROJECT, Tracked, named
from flatlora_diffusion.train.tried import Tried, size_of, time_heldout, time_picture
from flatlora_diffusion.train.validation import Validation, draw_validation

logger = logging.getLogger(__name__)

MOST_SKIPPED = 24
"""Steps in a row whose gradients aren't finite: the scale, which begins at 2^16, is then far below 1."""


class Run:
    """One training run with one method.

    Args:
        config: Its settings.
        samples: The training images.
        class_samples: The images of the class, for prior preservation.
        heldout_samples: The images that are not trained, whose loss is logged.
        side_by_side: Shows the validation pictures of this run and of those that it is compared with.
        callbacks: What the run calls.
        encodings: What other runs have encoded already.
        found: What folds have found: the run ends after their best step, with the schedules of all steps.
        label: Of a fold: what the progress bar and trackers call it.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: list[Sample],
        class_samples: Sequence[Sample] = (),
        heldout_samples: Sequence[Sample] = (),
        side_by_side: SideBySide | None = None,
        callbacks: Callback | None = None,
        encodings: Encodings | None = None,
        found: Folds | None = None,
        label: str | None = None,
    ) -> None:
        self.config = config
        self.samples = samples
        self.class_samples = class_samples
        self.heldout_samples = heldout_samples
        self.side_by_side = side_by_side
        self.callbacks = callbacks or Callback()
        self.encodings = encodings
        self.found = found
        self.label = label
        self.output = Path(config.output_dir)
        self.accelerator = make_accelerator(config)
        samples_a_micro_step = config.train_batch_size * self.accelerator.num_processes
        self.samples_a_step = samples_a_micro_step * config.gradient_accumulation_steps
        images, class_images = (sum(sample.repeats for sample in own) for own in (samples, class_samples))
        samples_an_epoch = max(images * config.repeats, class_images)
        self.steps_an_epoch = math.ceil(samples_an_epoch / self.samples_a_step)
        self.left_over = samples_an_epoch % self.samples_a_step
        self.total_steps = config.max_train_steps or config.num_train_epochs * self.steps_an_epoch
        self.last_step = found.best_step if found else self.total_steps
        self.text_encoder_steps = config.text_encoder_steps(self.total_steps)
        self.settings = deciding_settings(
            config, self.total_steps, digest([*samples, *class_samples]), self.accelerator
        )
        require_same(self.settings)
        self.seconds: list[float] = []

    def train(self) -> Tracked:
        """Train, or go on from a checkpoint; leave the adapter and the summary in the output folder.

        Returns:
            The trackers, still open; none where the run was complete already.
        """
        config = self.config
        resuming = config.resume_from_checkpoint == "latest"
        if resuming and from_main(self._is_complete):
            logger.info("%s is complete already", self.output)
            return Tracked()
        stored = None
        wanted = config.resume_from_checkpoint
        if wanted:
            # Other machines may not see the main process's disk.
            stored = from_main(lambda: find_checkpoint(self.output, wanted, self.settings))
            if stored is None:
                logger.info("no checkpoint in %s yet; starting from the beginning", self.output)
            else:
                require_steps_left(
                    *(stored.folder, stored.step, stored.differences, self.total_steps),
                    best_of_folds=self.found.best_step if self.found else None,
                )
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with out_of_memory_as_error(f"before the first step: {leaner(config)}"):
            self._set_up(resuming=stored is not None)
        tracked = Tracked()
        try:
            if self.accelerator.is_main_process:
                self.output.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            start = 0
            if stored:
                self.state.resume(stored)
                start = self.public.step = stored.step
                logger.info("resuming from %s at step %d of %d", stored.folder, start, self.last_step)
            self._start_trackers()
            last_epoch = math.ceil(self.last_step / self.steps_an_epoch) - 1
            tracked = Tracked(self.accelerator.trackers, last_epoch)
            with stop_request() as stop:
                self.validation.before(start)
                self.callbacks.on_train_begin(self.public)
                last = self._loop(start, stop)
                self.callbacks.on_train_end(self.public)
                save(self, last)
                if self._anyone_stops(stop):  # it came while the adapter was being saved
                    self._stop(f"saved {self.output / WEIGHTS_NAME}", stop)
        except BaseException:
            tracked.finish()
            raise
        finally:
            self.state.close()
        return tracked

    def try_steps(self, steps: int, images: int) -> Tried:
        """Take some first steps and leave nothing of them; the run can't be used afterwards.

        After them the loss of one held-out image is measured, and a picture drawn, where the run does so.

        Args:
            steps: How many at most.
            images: So many of each kind are encoded for them.
        """
        self.samples, self.class_samples = self.samples[:images], self.class_samples[:images]
        self.heldout_samples = self.heldout_samples[:1]
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began, seconds = time.perf_counter(), []
        with out_of_memory_as_error(f"before the first step: {leaner(self.config)}"):
            self._set_up(resuming=False)
        ready = time.perf_counter() - began
        try:
            for step in range(min(steps, self.total_steps)):
                began = time.perf_counter()
                with out_of_memory_as_error(f"at step {step + 1}: {leaner(self.config)}"):
                    if step >= self.text_encoder_steps:
                        self.learner.freeze_text_encoders()
                    loss, _ = self._optimizer_step(step, StopRequest())
                self.state.advance(loss)
                seconds.append(time.perf_counter() - began)
            heldout = picture = None
            if self.accelerator.is_main_process:
                if self.heldout_samples:
                    heldout = time_heldout(self.learner.heldout_loss)
                if self.config.prompts_to_draw:
                    picture = time_picture(partial(draw_validation, self.learner), self.config)
            self.accelerator.wait_for_everyone()
            return Tried(ready, seconds, heldout, picture, size_of(self.state.checkpoint(len(seconds))))
        finally:
            self.state.close()

    def _is_complete(self) -> bool:
        # The summary is written last: without it, a kill may have come before the kohya file too.
        written = (self.output / SUMMARY).is_file()
        last = stopped_at(self.output) or self.last_step
        return written and is_complete(self.output, self.settings, last)

    def _set_up(self, resuming: bool) -> None:
        config = self.config
        self.learner = Learner(
            config,
            self.accelerator,
            self.samples,
            self.class_samples,
            self.heldout_samples,
            encodings=self.encodings,
            resuming=resuming,
        )
        # Of two runs that are compared the first one has said it.
        if self.accelerator.is_main_process and not (self.side_by_side and config.method == FLAT):
            self.learner.tell_cut_captions()
            if self.left_over:
                logger.info(
                    "an epoch is %d steps of %d samples: the images fill the last one to %d, and the next "
                    "epoch's the rest (the diffusers script takes a smaller step)",
                    *(self.steps_an_epoch, self.samples_a_step, self.left_over),
                )
        lr_factor = self.samples_a_step if config.scale_lr else 1
        self.state = TrainingState(self.learner, config, self.settings, self.total_steps, lr_factor)
        self.validation = Validation(
            self.learner,
            self.state,
            config,
            folder=self.output / FOLDER,
            images=len(self.samples),
            steps_an_epoch=self.steps_an_epoch,
            total_steps=self.last_step,
            side_by_side=self.side_by_side,
        )
        self.public = TrainingRun(
            config,
            config.method,
            self.output,
            self.accelerator,
            self.learner.trained,
            self.state.flat,
            self.state.optimizer,
            self.total_steps,
        )

    def _start_trackers(self) -> None:
        settings = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in self.config.settings().items()
        }
        # With `compare` a project has both arms.
        names = named(self.label or self.config.method) if self.side_by_side or self.label else {}
        self.accelerator.init_trackers(PROJECT, config=settings, init_kwargs=names)

    # The loop.

    def _loop(self, start: int, stop: StopRequest) -> int:
        """Train; the last step, which --stop_when_worse may make an earlier one than planned."""
        hidden = not self.accelerator.is_local_main_process
        with StepBar(self.label or self.config.method, start, self.last_step, hidden=hidden) as bar:
            for step in range(start, self.last_step):
                if self._is_worse():
                    return step
                began = time.perf_counter()
                sigma, lr = self.state.flat.sigma_t, self.state.lr_scheduler.get_last_lr()[0]
                with out_of_memory_as_error(f"at step {step + 1}: {leaner(self.config)}"):
                    if step >= self.text_encoder_steps:
                        self.learner.freeze_text_encoders()
                    loss, stopping = self._optimizer_step(step, stop)
                norms = self.state.advance(loss)
                self.seconds.append(time.perf_counter() - began)
                bar.set_postfix(loss=f"{loss:.4f}", sigma=f"{sigma:.3f}", lr=f"{lr:.1e}")
                bar.update()
                self.accelerator.log({"loss": loss, "sigma": sigma, "lr": lr, **norms}, step=step + 1)
                self.public.step, self.public.loss, self.public.sigma = step + 1, loss, sigma
                self.callbacks.on_step_end(self.public)
                self._after_step(step + 1, bar)
                if stopping:
                    self._interrupt(step + 1, stop)
                if self.validation.is_due(step + 1):
                    with bar.doing("drawing validation pictures"):
                        self.validation.after(step + 1)
        return self.last_step

    def _is_worse(self) -> bool:
        """Whether the held-out loss has been above its lowest for too long."""
        patience = self.config.stop_when_worse
        return patience is not None and from_main(lambda: is_worse(self.state.heldout_losses, patience))

    def _after_step(self, step: int, bar: StepBar) -> None:
        """What is due after so many steps: the loss of held-out images, a checkpoint."""
        if self.heldout_samples and (step % self.config.heldout_steps == 0 or step == self.total_steps):
            with bar.doing("measuring the held-out loss"):
                self._measure_heldout(step)
        if step % self.config.checkpointing_steps == 0:
            with bar.doing("saving a checkpoint"):
                self._save_checkpoint(step)

    def _optimizer_step(self, step: int, stop: StopRequest) -> tuple[float, bool]:
        """One optimizer step: the mean loss of its samples, and whether to stop after it."""
        accelerator, updates = self.accelerator, self.state.updates
        total = self.callbacks.backward(self.public, partial(self._backward, step)).detach()
        # All processes stop together, or none: their flags travel with the loss.
        flags = torch.stack([total, torch.full_like(total, float(stop.signal_number is not None))])
        means = accelerator.reduce(flags, reduction="mean")
        assert isinstance(means, Tensor)
        mean_loss, stopping = means.tolist()
        if not math.isfinite(mean_loss):
            raise UserError(self._divergence(step, f"the loss became {mean_loss}"))
        norm = updates.step()
        # With a gradient scaler (fp16) such a step is skipped and the scale lowered: no help for ever.
        if not math.isfinite(norm) and (accelerator.scaler is None or updates.skipped >= MOST_SKIPPED):
            times = f" in {updates.skipped} steps in a row" if accelerator.scaler else ""
            raise UserError(self._divergence(step, f"the gradient's norm became {norm}{times}"))
        return mean_loss, stopping > 0

    def _backward(self, step: int) -> Tensor:
        """Leave a step's gradients in the parameters; the mean loss of this process's samples."""
        total = torch.zeros((), device=self.accelerator.device)
        micro_steps = self.config.gradient_accumulation_steps
        for micro in range(micro_steps):
            micro_step = step * micro_steps + micro
            with self.state.updates.accumulating():
                loss = self.callbacks.loss(self.public, partial(self.learner.loss, micro_step))
                self.state.updates.backward(loss)
            total += loss.detach() / micro_steps
        return total

    def _measure_heldout(self, step: int) -> None:
        if self.accelerator.is_main_process:
            with self.state.averaged():
                loss = self._heldout_loss(step)
            if loss is not None:
                self.state.note_heldout(step, loss)
                self.accelerator.log({"heldout_loss": loss}, step=step)
            if self.label and self.config.use_ema:  # folds find out whether the average is better
                live = self._heldout_loss(step)
                if live is not None:
                    self.state.live_losses[step] = live
                    self.accelerator.log({LIVE_HELDOUT: live}, step=step)
        self.accelerator.wait_for_everyone()

    def _heldout_loss(self, step: int) -> float | None:
        return if_memory_lasts(
            self.learner.heldout_loss,
            lambda: None,
            f"while the held-out loss was measured: there is none at step {step}, and training goes "
            "on; a smaller --train_batch_size needs less",
        )

    def _divergence(self, step: int, what: str) -> str:
        newest = newest_checkpoint(self.output)
        kept = f"{newest} is sound" if newest else "no checkpoint had been written"
        return (
            f"{what} at step {step + 1} and nothing was updated with it ({kept}); "
            "lower --learning_rate, or use bf16 instead of fp16"
        )

    def _save_checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            write_checkpoint(self.output, self.state.checkpoint(step), self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self.callbacks.on_checkpoint(self.public)

    def _interrupt(self, step: int, stop: StopRequest) -> None:
        if step % self.config.checkpointing_steps:  # else it has been saved
            self._save_checkpoint(step)
        saved = f"{self.output}/checkpoint-{step}"
        self._stop(f"stopped after step {step} of {self.last_step}, saved {saved}", stop)

    def _anyone_stops(self, stop: StopRequest) -> bool:
        flag = torch.tensor(float(stop.signal_number is not None), device=self.accelerator.device)
        flags = self.accelerator.reduce(flag, reduction="sum")
        assert isinstance(flags, Tensor)
        return flags.item() > 0

    def _stop(self, what: str, stop: StopRequest) -> NoReturn:
        resume = ["--resume_from_checkpoint", "latest"]
        installed = invoked_as("")
        words = [installed or sys.argv[0], *without_token(unabbreviated(sys.argv[1:]))]
        command = shell_line(words if words[-2:] == resume else [*words, *resume])
        how = f"\n  {'' if installed else 'python '}{command}"
        if self.accelerator.num_processes > 1:  # the launcher's own words aren't known here
            how = f" the same launcher and\n  {command}"
        raise RunInterruptedError(
            f"{what}; go on with{how}",
            stop.signal_number or signal.SIGINT,  # another process may have got the signal
        )
