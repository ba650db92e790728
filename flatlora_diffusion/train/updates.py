"""From losses to new parameters: backward passes, gradients averaged over processes, clipping, optimizer."""

from __future__ import annotations

import contextlib
import math
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from flatlora_diffusion.config.settings import TrainConfig


class Updates(Protocol):
    """The part of an optimizer step that depends on how processes work together.

    Attributes:
        model: What computes the losses, so that gradients are averaged over the processes.
    """

    model: nn.Module

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around the forward and backward pass of a micro-batch; `last` of its optimizer step or not."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss, as its share of the optimizer step."""
        ...

    def step(self) -> float:
        """Clip the gradients and update, or do nothing where their norm, which is returned, isn't finite."""
        ...

    def whole_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer that has the state of every parameter, of whatever process (all must call this)."""
        ...

    def adopt(self, whole: torch.optim.Optimizer) -> None:
        """Go on with the state of what `whole_optimizer` gave, after it was changed."""
        ...

    def close(self) -> None:
        """Let go of the models."""
        ...


def make_updates(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Updates:
    """The kind of updates that the launcher asked for."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from flatlora_diffusion.train.zero import ZeroUpdates  # needs DeepSpeed

        return ZeroUpdates(objective, optimizer, config)
    return PlainUpdates(accelerator, objective, optimizer, config)


class PlainUpdates:
    """One process, or several of which each has everything (distributed data parallel).

    Args:
        accelerator: Scales gradients (fp16), knows the other processes.
        objective: Computes the losses of a batch.
        optimizer: Of the parameters that are trained.
        config: Norm to which gradients are clipped.
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
            self.model = nn.parallel.DistributedDataParallel(
                objective,
                # The first text encoder's last layer never enters the prompt's embedding, a caption may lack
                # a new token, and text encoders may be frozen before the end.
                find_unused_parameters=config.train_text_encoder or config.train_text_encoder_ti,
            )
        self._accelerator = accelerator
        self._whole = optimizer
        self._optimizer = accelerator.prepare(optimizer)
        self._max_norm = config.max_grad_norm

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """See `Updates.accumulating`: gradients travel after the last micro-batch; accelerate counts."""
        return self._accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        """See `Updates.backward`."""
        self._accelerator.backward(loss)

    def step(self) -> float:
        """See `Updates.step`. With a gradient scaler (fp16) a skipped step lowers the scale."""
        parameters = [p for group in self._whole.param_groups for p in group["params"]]
        norm = float(self._accelerator.clip_grad_norm_(parameters, self._max_norm))
        if self._accelerator.scaler is not None or math.isfinite(norm):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return norm

    def whole_optimizer(self) -> torch.optim.Optimizer:
        """See `Updates.whole_optimizer`: every process has it."""
        return self._whole

    def adopt(self, whole: torch.optim.Optimizer) -> None:
        """See `Updates.adopt`: it is the very one."""

    def close(self) -> None:
        """See `Updates.close`: nothing else holds them."""
