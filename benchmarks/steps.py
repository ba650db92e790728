"""Training steps of several arms in one process: their seconds, taken in turn, and the memory they hold."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.common import now
from benchmarks.memory import MIB, CpuLedger, CudaLedger, Memory, sampled_between_layers
from benchmarks.sam import base_weights
from benchmarks.step_arms import ARMS, PLAIN, PlainLoRA, copy_sharing_base


@dataclass
class Result:
    """What was measured in one case: seconds of every repeat and MiB beyond plain LoRA, by arm."""

    case: str
    adapted_layers: int
    largest_weight_mib: float
    all_weights_mib: float
    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, float]]


def first_step(
    case: Case, model: nn.Module, build: Callable[[nn.Module, nn.Module], PlainLoRA]
) -> tuple[PlainLoRA, Memory]:
    """Make an arm and let it take a step, while its memory is measured.

    Args:
        case: What to train.
        model: The case's, or a copy of it; what it has already is not counted.
        build: Makes the arm.
    """
    known = [*model.parameters(), *model.buffers()]
    memory = Memory()
    with CudaLedger() if known[0].device.type == "cuda" else CpuLedger(known) as ledger:

        def loss(model: nn.Module) -> Tensor:
            with sampled_between_layers(model, ledger.live, memory.between_layers):
                return case.loss(model)

        arm = build(model, model.get_submodule(case.perturbed))
        ledger.reset_peak()
        arm.train_step(loss)
        memory.at_rest, memory.peak = ledger.live(), ledger.peak()
    return arm, memory


def measure(case: Case, deadline: float, repeats: int | None, names: Sequence[str] = tuple(ARMS)) -> Result:
    """Warm up while measuring memory, then time the arms in turn.

    Args:
        case: What to train.
        deadline: Value of `time.monotonic()` after which no repeat is begun, if two are done.
        repeats: Take exactly this many repeats instead.
        names: Of the arms, plain LoRA among them.
    """
    device = next(case.model.parameters()).device
    # What the first pass through a model allocates for good (workspaces of libraries) is no arm's.
    case.loss(case.model).backward()
    case.model.zero_grad()

    arms: dict[str, PlainLoRA] = {}
    memory: dict[str, Memory] = {}
    for name in names:
        arms[name], memory[name] = first_step(case, copy_sharing_base(case.model), ARMS[name])

    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.monotonic()
    for done in itertools.count():
        next_end = time.monotonic() + (time.monotonic() - began) / max(done, 1)
        if done == repeats or (repeats is None and done >= 2 and next_end > deadline):
            break
        for name in [*names[done % len(names) :], *names[: done % len(names)]]:
            start = now(device)
            arms[name].train_step(case.loss)
            seconds[name].append(now(device) - start)

    sizes = [weight.nbytes / MIB for weight in base_weights([case.model.get_submodule(case.perturbed)])]
    return Result(
        case=case.name,
        adapted_layers=len(sizes),
        largest_weight_mib=max(sizes),
        all_weights_mib=sum(sizes),
        seconds=seconds,
        memory={name: memory[name].beyond(memory[PLAIN]) for name in names},
    )


def ratio(ones: Sequence[float], others: Sequence[float]) -> str:
    """Median, least and greatest of the paired ratios."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
