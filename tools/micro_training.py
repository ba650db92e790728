"""What every training stage shares: a clock that ends the schedule in time, checkpoints and EMA."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn


def save_atomically(state: dict, path: Path) -> None:
    """Write ``state`` so that a kill leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class Stage:
    """One training stage: a budget in minutes drives the learning rate, so its decay always ends in time.

    The budget counts training time only and over all resumptions. What the stage gives in the end is the
    running average of the weights.
    """

    def __init__(self, name: str, modules: nn.Module, work: Path, minutes: float, lr: float, seed: int):
        """Start the stage, or resume it from ``work / f"{name}.ckpt"``.

        Args:
            name: used for the checkpoint and the progress lines.
            modules: what is trained (a ``ModuleDict`` for several).
            work: the folder of checkpoints.
            minutes: the budget.
            lr: the highest learning rate.
            seed: of the stage's private generator.
        """
        self.name, self.modules, self.path, self.budget, self.lr = (
            name,
            modules,
            work / f"{name}.ckpt",
            minutes * 60,
            lr,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.average = deepcopy(modules).requires_grad_(False).eval()
        self.step, self.spent, self.losses = 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.step, self.spent = state["step"], state["spent"]
            print(f"[{name}] resumed at step {self.step}, {self.spent / 60:.1f} min", flush=True)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return min(self.spent / self.budget, 1.0)

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the budget is spent; checkpoint every three minutes and at the end."""
        saved = printed = time.monotonic()
        while self.progress < 1.0:
            start = time.monotonic()
            yield self.step
            now = time.monotonic()
            self.spent += now - start
            if now - printed > 20:
                loss = sum(self.losses) / len(self.losses)
                minutes, rate = self.spent / 60, self.step / self.spent
                print(
                    f"[{self.name}] {minutes:5.1f} min  step {self.step}  {rate:.2f}/s  loss {loss:.5f}",
                    flush=True,
                )
                printed, self.losses = now, []
            if now - saved > 180 or self.progress >= 1.0:
                self.save()
                saved = now

    def update(self, loss: torch.Tensor) -> None:
        """Backpropagate, clip, step, and update the running average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        warm_up = min((self.step + 1) / 50, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * self.progress)) / 2)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
        self.losses.append(loss.item())
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "spent": self.spent,
        }
        save_atomically(state, self.path)
