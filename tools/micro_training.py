"""What every training stage shares: the schedule, the optimizer, checkpoints and the running average."""

from __future__ import annotations

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
SEEDS_APART = 1000  # more than the stages' own seeds
COOL_DOWN = 0.2  # the last part of a stage, over which the learning rate falls to nothing


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


def learning_rate_factor(step: int, first: int, total: int) -> float:
    """Warm up, stay, and fall linearly at the end.

    Until the fall begins nothing depends on ``total``: a stage can be made longer, or stopped for good by
    naming an earlier end.

    Args:
        step: steps taken so far.
        first: the step that the optimizer began at, without any state.
        total: the length of the stage.
    """
    return min((step - first + 1) / WARM_UP_STEPS, 1.0, (total - step) / max(COOL_DOWN * total, 1.0))


def rows_of_step(step: int, batch: int, count: int, seed: int) -> torch.Tensor:
    """The rows of a batch: every row of the data once, in an order of its own, before any comes again.

    Args:
        step: steps taken so far.
        batch: rows in a batch.
        count: rows of the data.
        seed: of the orders.
    """
    first, past = step * batch, (step + 1) * batch
    passes = range(first // count, (past - 1) // count + 1)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(seed + n)) for n in passes]
    start = first - passes[0] * count
    return torch.cat(orders)[start : start + batch]


def read_progress(work: Path, name: str) -> dict[str, float]:
    """The ``step`` that stage ``name`` is at, and the ``seconds`` of CPU time that it took."""
    state = torch.load(work / f"{name}.ckpt", weights_only=True, mmap=True)  # its tensors are not read
    return {"step": state["step"], "seconds": state["seconds"]}


def is_adopted(work: Path, name: str) -> bool:
    """Whether stage ``name`` was taken, finished, from an export, which has only the average."""
    path = work / f"{name}.ckpt"
    return path.exists() and "modules" not in torch.load(path, weights_only=True, mmap=True)


class Stage:
    """One training stage: Muon and AdamW with warm-up, a constant learning rate, and a fall at the end.

    What the stage gives in the end is the running average of the weights. Everything random comes from
    ``generator``, whose state is in the checkpoint: on one machine with one thread count, a stage that was
    killed and resumed ends with the bits of one that was not.

    Attributes:
        modules: what is trained.
        average: its running average.
        generator: the source of randomness, on the CPU.
        step: steps taken so far.
        seconds: the CPU time that they took.
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
        self.name, self.modules, self.path = name, modules, work / f"{name}.ckpt"
        self.total, self.lr, self.decay = steps, lr, decay
        self.generator = torch.Generator().manual_seed(seed)
        hidden, rest = split_parameters(modules) if muon else ([], list(modules.parameters()))
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
        if hidden:
            self.optimizers.append(Muon(hidden, lr=lr))
        self.average = deepcopy(modules).requires_grad_(False).eval()
        self.first, self.step, self.seconds, self.losses = 0, 0, 0.0, []
        if self.path.exists():
            self._resume(seed)

    def _resume(self, seed: int) -> None:
        state = torch.load(self.path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.average.load_state_dict(state["average"])
        if "modules" in state:
            self.modules.load_state_dict(state["modules"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.generator.set_state(state["generator"])
            self.first = state["first"]
        else:  # taken from an export: only the average is left, and the same draws shouldn't come again
            self.modules.load_state_dict(state["average"])
            self.generator.manual_seed(seed + SEEDS_APART * self.step)
            self.first = self.step
        print(f"[{self.name}] resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that are left; checkpoint every two minutes and at the end."""
        saved = printed = time.monotonic()
        while self.step < self.total:
            start = time.process_time()
            yield self.step
            self.seconds += time.process_time() - start
            now = time.monotonic()
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
        lr = self.lr * learning_rate_factor(self.step, self.first, self.total)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
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
            "first": self.first,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)
