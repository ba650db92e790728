"""All that changes while a run trains: how it moves on, is written down, and is taken up again."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flatlora_diffusion.adapter.file import LIVE_NAME, WEIGHTS_NAME, adapter_bytes, load_adapter_tensors
from flatlora_diffusion.adapter.new_tokens import EMBEDDINGS_NAME, FACTS_KEY
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.flat.noise import sigma_at
from flatlora_diffusion.output import record
from flatlora_diffusion.output.checkpoint import (
    OPTIMIZER_NAME,
    Checkpoint,
    Stored,
    flatten_optimizer,
    optimizer_numbers,
    restore_optimizer,
)
from flatlora_diffusion.output.going_on import consequences, in_words
from flatlora_diffusion.output.names import LIVE_HELDOUT
from flatlora_diffusion.train.best import BestStep
from flatlora_diffusion.train.ema import AdapterAverage
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.optimizers import make_optimizer, parameter_groups
from flatlora_diffusion.train.processes import from_main
from flatlora_diffusion.train.update_norms import UpdateNorms
from flatlora_diffusion.train.updates import Updates

logger = logging.getLogger(__name__)

# In an optimizer's groups what is no state but the run's: it may go on with other ones.
_SETTINGS = {"lr", "initial_lr", "betas", "weight_decay", "eps", "beta3"}


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
        skipped: Steps so far that changed nothing, see `Updates.skipped`.
        changes: Settings with which the run went on from a checkpoint that had others, in words.
        losses: Of every step so far.
        heldout_losses: Step -> loss of the held-out images.
        live_losses: The same of the adapter itself, where the average's are the others: in folds alone.
        best: The adapter with the lowest of them, in the main process.
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
        self._total_steps = total_steps
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
        self.updates = Updates(self._accelerator, learner.wrap(), self.optimizer, config)
        learner.objective = self.updates.model
        self.skipped = 0
        self.changes: list[str] = []
        self.losses: list[float] = []
        self.heldout_losses: dict[int, float] = {}
        self.live_losses: dict[int, float] = {}
        self.best = BestStep()

    def advance(self, loss: float) -> dict[str, float]:
        """Take note of a step's loss and move on to the next step; what the tracker is told of the norms.

        After a step that was skipped the next one has its learning rate and its noise.
        """
        self.losses.append(loss)
        if self.updates.skipped:
            self.skipped += 1
            return self._limit_norms()
        if self._learner.tokens is not None:
            self._learner.tokens.keep_scale()
        self.lr_scheduler.step()
        norms = self._limit_norms()
        if self._average:
            self._average.step()
        self.flat.step()
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

    def note_heldout(self, step: int, loss: float) -> None:
        """Take note of the loss of the held-out images after a step."""

        def files() -> dict[str, bytes]:
            adapter, others = self.files(step)
            return {WEIGHTS_NAME: adapter, **others}

        self.heldout_losses[step] = loss
        self.best.offer(step, loss, files)

    def checkpoint(self, step: int) -> Checkpoint:
        """All of it."""
        scalars = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "losses": self.losses,
            "heldout_losses": self.heldout_losses,
            "optimizer": optimizer_numbers(self.optimizer),
        }
        if self.live_losses:
            scalars[LIVE_HELDOUT] = self.live_losses
        if self.changes:
            scalars["changes"] = self.changes
        if self._accelerator.scaler is not None:
            scalars["scaler"] = self._accelerator.scaler.state_dict()
        if self.skipped:
            scalars["skipped"] = self.skipped
        adapter, others = self.files(step)
        best, known = self.best.for_checkpoint()
        others, scalars = others | best, scalars | known
        return Checkpoint(step, adapter, flatten_optimizer(self.optimizer), self._settings, scalars, others)

    def resume(self, stored: Stored) -> None:
        """Go on from what `checkpoint` gave, bit for bit."""

        def tensors(name: str) -> dict[str, Tensor]:
            return from_main(lambda: stored.tensors(name))  # other machines may not see the main one's disk

        trained = self._learner.trained
        self.skipped = stored.scalars.get("skipped", 0)
        updates = stored.step - self.skipped
        load_adapter_tensors(trained, tensors(WEIGHTS_NAME))
        if self._average:
            self._average.resume(updates)
            load_adapter_tensors(trained, tensors(LIVE_NAME))
        if self._learner.tokens is not None:
            self._learner.tokens.load(tensors(EMBEDDINGS_NAME))
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in _SETTINGS & group.keys()} for group in groups]
        restore_optimizer(self.optimizer, tensors(OPTIMIZER_NAME), stored.scalars["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self._resume_learning_rates(stored)
        if self._accelerator.scaler is not None and "scaler" in stored.scalars:
            self._accelerator.scaler.load_state_dict(stored.scalars["scaler"])
        self.flat.global_step = updates
        self.changes = [*stored.scalars.get("changes", ()), *self._told(stored)]
        self.losses = list(stored.scalars["losses"])
        self.heldout_losses = {int(k): loss for k, loss in stored.scalars["heldout_losses"].items()}
        self.live_losses = {int(k): loss for k, loss in stored.scalars.get(LIVE_HELDOUT, {}).items()}
        if self._accelerator.is_main_process:
            self.best.resume(stored)

    def _resume_learning_rates(self, stored: Stored) -> None:
        """Put the schedule at the checkpoint's step: those there are of the rate and length of now."""
        scheduler = self.lr_scheduler
        assert isinstance(scheduler, LambdaLR), "all of diffusers' schedules that are offered are"
        scheduler.load_state_dict(stored.scalars["lr_scheduler"] | {"base_lrs": scheduler.base_lrs})
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates  # it has no other way
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _told(self, stored: Stored) -> list[str]:
        """What goes on with other settings, which the log says with what it means."""
        if not stored.differences:
            return []
        then, config = stored.settings, self._config
        strength = then.get("flat_sigma", 0.0)
        length = then.get("max_train_steps", self._total_steps)
        schedule = then.get("flat_schedule", config.flat_schedule)
        meaning = consequences(
            stored.differences,
            sigma=(sigma_at(strength, self.flat.global_step, length, schedule), self.flat.sigma_t),
            rate=(stored.scalars["lr_scheduler"]["_last_lr"][0], float(self.lr_scheduler.get_last_lr()[0])),
            total_steps=self._total_steps,
        )
        words = in_words(stored.differences)
        logger.warning("%s goes on with other settings: %s", stored.folder, "; ".join([*words, *meaning]))
        return [f"from step {stored.step}: {difference}" for difference in words]

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
        if self.changes:
            facts["changes"] = self.changes
        if self._learner.tokens is not None:
            facts[FACTS_KEY] = self._learner.tokens.facts()
        return adapter_bytes(trained, facts)
