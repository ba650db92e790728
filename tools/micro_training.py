"""What every training stage shares: the schedule, the optimizer, checkpoints and the running average."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path

import torch
from micro_muon import Muon
from torch import nn

SECONDS_BETWEEN_CHECKPOINTS = 120
SECONDS_BETWEEN_LINES = 20
WARM_UP_STEPS = 50


def save_atomically(state: dict, path: Path) -> None:
    """Write ``state`` so that a kill leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def fast_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 where the hardware has it: elsewhere it is emulated, and slower than float32."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def split_parameters(modules: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden layers' weights, for Muon, and the rest, for AdamW.

    Muon is not meant for vectors, embeddings, and the layers that touch pixels or latents.
    """
    hidden, rest = [], []
    for name, parameter in modules.named_parameters():
        outer = "embedding" in name.removesuffix(".weight").rsplit(".", 1)[-1] or "conv_in" in name
        is_hidden = parameter.ndim >= 2 and not outer and "conv_out" not in name
        (hidden if is_hidden else rest).append(parameter)
    return hidden, rest


def read_progress(work: Path, name: str) -> tuple[int, float]:
    """The steps and minutes that stage ``name`` has taken so far."""
    state = torch.load(work / f"{name}.ckpt", weights_only=True)
    return state["step"], state["seconds"] / 60


class Stage:
    """One training stage: Muon and AdamW with warm-up and cosine decay over a fixed number of steps.

    What the stage gives in the end is the running average of the weights. Everything random comes from
    ``generator``, whose state is in the checkpoint: on one machine with one thread count, a stage that was
    killed and resumed ends with the bits of one that was not.

    Attributes:
        modules: what is trained.
        average: its running average.
        generator: the source of randomness, on the CPU.
        step: steps taken so far.
    """

    def __init__(
        self,
        name: str,
        modules: nn.Module,
        work: Path,
        steps: int,
        lr: float,
        seed: int,
        decay: float = 0.998,
        muon: bool = True,
    ):
        """Start the stage, or resume it from ``work / f"{name}.ckpt"``.

        Args:
            name: used for the checkpoint and the progress lines.
            modules: what is trained (a ``ModuleDict`` for several), on the device to train on.
            work: the folder of checkpoints.
            steps: the length of the stage.
            lr: the highest learning rate.
            seed: of the stage's private generator.
            decay: of the running average.
            muon: whether hidden layers are trained by Muon; AdamW takes the rest, or everything.
        """
        self.name, self.modules, self.path, self.total, self.lr = (
            name,
            modules,
            work / f"{name}.ckpt",
            steps,
            lr,
        )
        self.decay = decay
        self.generator = torch.Generator().manual_seed(seed)
        hidden, rest = split_parameters(modules) if muon else ([], list(modules.parameters()))
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
        if hidden:
            self.optimizers.append(Muon(hidden, lr=lr))
        self.average = deepcopy(modules).requires_grad_(False).eval()
        self.step, self.seconds, self.losses = 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.generator.set_state(state["generator"])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"[{name}] resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that are left; checkpoint every two minutes and at the end."""
        saved = printed = time.monotonic()
        while self.step < self.total:
            start = time.monotonic()
            yield self.step
            now = time.monotonic()
            self.seconds += now - start
            if now - printed > SECONDS_BETWEEN_LINES:
                loss = sum(self.losses) / len(self.losses)
                minutes, left = self.seconds / 60, (self.total / self.step - 1) * self.seconds / 60
                print(
                    f"[{self.name}] step {self.step}/{self.total}  loss {loss:.5f}  "
                    f"{minutes:.1f} min, {left:.1f} left",
                    flush=True,
                )
                printed, self.losses = now, []
            if now - saved > SECONDS_BETWEEN_CHECKPOINTS or self.step == self.total:
                self.save()
                saved = now

    def update(self, loss: torch.Tensor) -> None:
        """Backpropagate, clip, step, and update the running average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        warm_up = min((self.step + 1) / WARM_UP_STEPS, 1.0)
        cosine = (1 + math.cos(math.pi * self.step / self.total)) / 2
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * warm_up * (0.02 + 0.98 * cosine)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            ours, theirs = list(self.average.parameters()), list(self.modules.parameters())
            torch._foreach_lerp_(ours, theirs, 1 - decay)
        self.losses.append(loss.item())
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)
