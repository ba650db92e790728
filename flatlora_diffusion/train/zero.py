"""ZeRO-1 and ZeRO-2 (arXiv 1910.02054) by DeepSpeed: each process keeps a part of the optimizer's state.

Only the optimizer is split. Every process has all parameters, so noise, adapters and pictures are those of
plain data parallelism, and so are the checkpoints: a run can go on either way.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os

import deepspeed
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from flatlora_diffusion.config.settings import TrainConfig


class ZeroUpdates:
    """Updates by a DeepSpeed engine (see `updates.Updates`).

    DeepSpeed lays the parameters of a group end to end, pads them, and gives each process an equal part; the
    optimizer then has one flat parameter a group: this process's part.

    Args:
        objective: Computes the losses of a batch.
        optimizer: AdamW over whole parameters; from here on it updates this process's parts.
        config: Batch size, accumulation, norm to which gradients are clipped.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._optimizer = optimizer
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        elements = sum(p.numel() for group in self._parameters for p in group)
        # Its own defaults allocate gigabytes for the gradients of an adapter of some megabytes.
        bucket = elements + elements % 2
        self.model, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": config.train_batch_size,
                "gradient_accumulation_steps": config.gradient_accumulation_steps,
                "gradient_clipping": config.max_grad_norm,
                "zero_optimization": {
                    "stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)),
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "round_robin_gradients": False,  # the layout that `whole_optimizer` undoes
                },
                "steps_per_print": None,
            },
        )

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """See `Updates.accumulating`."""
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Updates.backward`."""
        self.model.backward(loss)

    def step(self) -> float:
        """See `Updates.step`."""
        # The parts are copies: what else has changed the parameters since the last step must not be undone.
        self.model.optimizer.refresh_fp32_params()
        self.model.step()
        return float(self.model.get_global_grad_norm()) if self.model.was_step_applied() else math.inf

    def whole_optimizer(self) -> torch.optim.Optimizer:
        """See `Updates.whole_optimizer`: the parts of all processes, put together."""
        groups = zip(self._optimizer.param_groups, self._parameters, strict=True)
        whole = type(self._optimizer)([{**group, "params": parameters} for group, parameters in groups])
        for part, parameters in self._parts():
            for name, value in self._optimizer.state[part].items():
                if value.dim() == 0:  # the count of steps
                    values = [value.clone() for _ in parameters]
                else:
                    sizes = [p.numel() for p in parameters]
                    values = gather(value)[: sum(sizes)].split(sizes)
                for parameter, one in zip(parameters, values, strict=True):
                    whole.state[parameter][name] = one.view(parameter.shape) if one.dim() else one
        return whole

    def adopt(self, whole: torch.optim.Optimizer) -> None:
        """See `Updates.adopt`: of every group the part of this process."""
        for group, changed in zip(self._optimizer.param_groups, whole.param_groups, strict=True):
            group.update({name: value for name, value in changed.items() if name != "params"})
        rank = PartialState().process_index
        for part, parameters in self._parts():
            # Data parallelism keeps no state of parameters that no gradient reaches.
            known = next((whole.state[p] for p in parameters if whole.state.get(p)), {})
            for name, value in known.items():
                if value.dim() == 0:
                    self._optimizer.state[part][name] = value.clone()
                    continue
                flat = value.new_zeros(part.numel() * PartialState().num_processes)
                start = 0
                for parameter in parameters:
                    if whole.state.get(parameter):
                        flat[start : start + parameter.numel()] = whole.state[parameter][name].flatten()
                    start += parameter.numel()
                own = flat[rank * part.numel() : (rank + 1) * part.numel()]
                self._optimizer.state[part][name] = own.clone()

    def close(self) -> None:
        """See `Updates.close`: DeepSpeed keeps tables of all modules."""
        self.model.destroy()

    def _parts(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The flat part of each group that this process has, and the group's whole parameters."""
        flat = [group["params"][0] for group in self._optimizer.param_groups]
        return list(zip(flat, self._parameters, strict=True))
