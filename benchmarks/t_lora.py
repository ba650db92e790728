"""T-LoRA (arXiv 2507.05964): the noisier a sample, the fewer ranks of the adapter are active.

At timestep t of T the first

    r(t) = floor((r_max - r_min) * (1 - t/T)^alpha) + r_min

ranks count; alpha is 1. The paper's orthogonal start from singular vectors (Ortho-LoRA) is left out:
the adapter starts as that of every other run. The saved file is an ordinary LoRA, of which each program uses
all ranks; pictures that are drawn as in the paper need `timestep_ranks` around the drawing too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.sam import lora_layers
from flatlora_diffusion.sdxl.lora import ADAPTER
from flatlora_diffusion.train.callbacks import Callback, TrainingRun

TIMESTEPS = 1000


def active_ranks(timesteps: Tensor, most: int, least: int) -> Tensor:
    """r(t), the number of active ranks.

    Args:
        timesteps: (N,), from 0, of a clean picture, to `TIMESTEPS` - 1.
        most: r_max, the adapter's rank.
        least: r_min.

    Returns:
        (N,) whole numbers.
    """
    return (most - least) * (TIMESTEPS - timesteps.long()) // TIMESTEPS + least


class TLora(Callback):
    """Trains the UNet's adapter by T-LoRA; losses that are measured in the run are under the mask as well.

    Args:
        share: r_min as a share of the rank, rounded down; 1 is plain LoRA.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share
        self._masks = contextlib.ExitStack()

    def on_train_begin(self, run: TrainingRun) -> None:
        """Mask the ranks."""
        self._masks.enter_context(timestep_ranks(run.models["unet"], self.share))

    def on_train_end(self, run: TrainingRun) -> None:
        """Unmask them."""
        self._masks.close()


@contextlib.contextmanager
def timestep_ranks(unet: nn.Module, share: float, adapter: str = ADAPTER) -> Iterator[None]:
    """Within the block only the first r(t) ranks of a UNet's adapter are active, for each sample its own.

    Args:
        unet: With the adapter.
        share: r_min as a share of a layer's rank, rounded down.
        adapter: Its name.
    """
    now: dict[str, Tensor] = {}

    def note(model: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now["timesteps"] = torch.as_tensor(timestep).reshape(-1)

    def mask(least: int, down: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        place = 1 if isinstance(down, nn.Conv2d) else -1  # of the ranks
        most = output.shape[place]
        ranks = active_ranks(now["timesteps"].to(output.device), most, least)
        active = torch.arange(most, device=output.device) < ranks[:, None]
        shape = [1] * output.ndim
        shape[0], shape[place] = active.shape
        return output * active.view(shape).to(output.dtype)

    # Checkpointing runs a sample's layers again before the UNet sees the next timesteps.
    hooks = [unet.register_forward_pre_hook(note, with_kwargs=True)]
    for layer in lora_layers([unet]):
        least = int(share * layer.r[adapter])
        hooks.append(layer.lora_A[adapter].register_forward_hook(partial(mask, least)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
