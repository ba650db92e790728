"""From losses to new parameters: backward passes, gradients averaged over processes, clipping, optimizer."""

from __future__ import annotations

import contextlib
import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatlora_diffusion.config.settings import TrainConfig


class Updates:
    """Updates in one process, or in several of which each has everything (distributed data parallel).

    Args:
        accelerator: Scales gradients (fp16), knows the other processes.
        objective: Computes the losses of a batch.
        optimizer: Of the parameters that are trained.
        config: Norm to which gradients are clipped.

    Attributes:
        model: What computes the losses, so that gradients are averaged over the processes.
        skipped: How many steps in a row, up to the last one, the gradient scaler (fp16) has skipped because
            their gradients weren't finite.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
    ) -> None:
        self.model = objective
        if accelerator.num_processes > 1:
            # Every process has loaded the base: only what is trained is sent around when they meet. There is
            # no other way to leave the rest out.
            frozen = [name for name, p in objective.named_parameters() if not p.requires_grad]
            own = [*frozen, *(name for name, _ in objective.named_buffers())]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, own)
            self.model = nn.parallel.DistributedDataParallel(
                objective,
                broadcast_buffers=False,  # none is ever written, and some leave the accelerator on the way
                # The first text encoder's last layer never enters the prompt's embedding, a caption may lack
                # a new token, and text encoders may be frozen before the end.
                find_unused_parameters=config.train_text_encoder or config.train_text_encoder_ti,
            )
        self._accelerator = accelerator
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._optimizer = accelerator.prepare(optimizer)
        self._max_norm = config.max_grad_norm
        self.skipped = 0

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Around the passes of a micro-batch: gradients travel after a step's last; accelerate counts."""
        return self._accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss, as its share of the optimizer step."""
        self._accelerator.backward(loss)

    def step(self) -> float:
        """Clip the gradients and update, or do nothing where their norm, which is returned, isn't finite.

        With a gradient scaler (fp16) a skipped step lowers the scale.
        """
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._max_norm)
        assert norm is not None, "accelerate returns none under DeepSpeed alone"
        norm = float(norm)
        if self._accelerator.scaler is not None or math.isfinite(norm):
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.skipped = self.skipped + 1 if self._optimizer.step_was_skipped else 0
        return norm
