"""All that changes while a run trains: how it moves on, is written down, and is taken up again."""

from __future__ import annotations

import contextlib
from typing import Any

from diffusers.optimization import get_scheduler
from torch import Tensor

from flatlora_diffusion.adapter.file import LIVE_NAME, WEIGHTS_NAME, adapter_bytes, load_adapter_tensors
from flatlora_diffusion.adapter.new_tokens import EMBEDDINGS_NAME, FACTS_KEY
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.output import record
from flatlora_diffusion.output.checkpoint import (
    OPTIMIZER_NAME,
    Checkpoint,
    Stored,
    flatten_optimizer,
    optimizer_numbers,
    restore_optimizer,
)
from flatlora_diffusion.train.ema import AdapterAverage
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.optimizers import make_optimizer, parameter_groups
from flatlora_diffusion.train.processes import from_main
from flatlora_diffusion.train.update_norms import UpdateNorms
from flatlora_diffusion.train.updates import Updates


class TrainingState:
    """The adapters with their optimizer, learning rates, noise and average, and the losses so far.

    Args:
        learner: The models with adapters; its objective is wrapped for the accelerator's processes.
        config: Settings of the run.
        settings: Those that decide its result (`record.deciding_settings`).
        total_steps: Optimizer steps in all.
        lr_factor: Multiplies every learning rate.

    Attributes:
        flat: The noise.
        updates: Takes the optimizer's steps.
        norms: Of the adapters' updates.
        losses: Of every step so far.
        heldout_losses: Step -> loss of the held-out images.
    """

    def __init__(
        self,
        learner: Learner,
        config: TrainConfig,
        settings: dict[str, Any],
        total_steps: int,
        lr_factor: float,
    ) -> None:
        self._learner = learner
        self._config = config
        self._settings = settings
        self._accelerator = learner.accelerator
        models = list(learner.trained.values())
        self.flat = FlatLoRA(
            models,
            sigma=config.flat_sigma,
            total_steps=total_steps,
            schedule=config.flat_schedule,
            noise=config.flat_noise,
            seed=config.seed,
        )
        self.norms = UpdateNorms(models)
        self._average = AdapterAverage(models, config.ema_decay) if config.use_ema else None
        self.optimizer = make_optimizer(parameter_groups(learner.learning, config, lr_factor), config)
        # The learning rate's schedule counts optimizer steps, so it isn't handed to accelerate, which would
        # step it once for every process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.updates = Updates(self._accelerator, learner.prepare(), self.optimizer, config)
        learner.objective = self.updates.model
        self.losses: list[float] = []
        self.heldout_losses: dict[int, float] = {}

    def advance(self, loss: float) -> dict[str, float]:
        """Take note of a step's loss and move on to the next step; what the tracker is told of the norms."""
        if self._learner.tokens is not None:
            self._learner.tokens.keep_scale()
        self.lr_scheduler.step()
        norms = self._limit_norms()
        if self._average:
            self._average.step()
        self.flat.step()
        self.losses.append(loss)
        return norms

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The models as they are saved and judged: with --use_ema the average in place of the adapter."""
        return self._average.applied() if self._average else contextlib.nullcontext()

    def files(self, step: int) -> tuple[bytes, dict[str, bytes]]:
        """The adapter's file, with --use_ema that of the average, and the files beside it by name."""
        tokens = self._learner.tokens
        others = {} if tokens is None else {EMBEDDINGS_NAME: tokens.file()}
        if not self._average:
            return self._adapter(step), others
        others[LIVE_NAME] = self._adapter(step)
        with self._average.applied():
            return self._adapter(step, averaged=True), others

    def checkpoint(self, step: int) -> Checkpoint:
        """All of it."""
        scalars = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "losses": self.losses,
            "heldout_losses": self.heldout_losses,
            "optimizer": optimizer_numbers(self.optimizer),
        }
        if self._accelerator.scaler is not None:
            scalars["scaler"] = self._accelerator.scaler.state_dict()
        adapter, others = self.files(step)
        return Checkpoint(step, adapter, flatten_optimizer(self.optimizer), self._settings, scalars, others)

    def resume(self, stored: Stored) -> None:
        """Go on from what `checkpoint` gave, bit for bit."""

        def tensors(name: str) -> dict[str, Tensor]:
            return from_main(lambda: stored.tensors(name))  # other machines may not see the main one's disk

        trained = self._learner.trained
        load_adapter_tensors(trained, tensors(WEIGHTS_NAME))
        if self._average:
            self._average.resume(stored.step)
            load_adapter_tensors(trained, tensors(LIVE_NAME))
        if self._learner.tokens is not None:
            self._learner.tokens.load(tensors(EMBEDDINGS_NAME))
        restore_optimizer(self.optimizer, tensors(OPTIMIZER_NAME), stored.scalars["optimizer"])
        self.lr_scheduler.load_state_dict(stored.scalars["lr_scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(stored.scalars["scaler"])
        self.flat.global_step = stored.step
        self.losses = list(stored.scalars["losses"])
        self.heldout_losses = {int(k): loss for k, loss in stored.scalars["heldout_losses"].items()}

    def close(self) -> None:
        """Leave the models as they were, but for their adapters."""
        self.flat.remove()

    def _limit_norms(self) -> dict[str, float]:
        """Apply --scale_weight_norms; what the tracker is told of the updates' norms."""
        if self._config.scale_weight_norms:
            norms, scaled = self.norms.limit(self._config.scale_weight_norms)
            limited = {"max_norm/keys_scaled": scaled, "max_norm/max_key_norm": norms.max().item()}
            return {"update_norm": norms.mean().item(), **limited}
        return {"update_norm": self.norms.measure().mean().item()} if self._accelerator.trackers else {}

    def _adapter(self, step: int, averaged: bool = False) -> bytes:
        trained = self._learner.trained
        facts = record.facts(self._config, self._settings, trained, step, averaged)
        if self._learner.tokens is not None:
            facts[FACTS_KEY] = self._learner.tokens.facts()
        return adapter_bytes(trained, facts)
