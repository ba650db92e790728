"""Several processes on the CPU, forked from the test's own: no launch, no import, no port."""

import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes

from flatlora_diffusion.common.errors import RunInterruptedError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback, TrainingRun

# Adam divides by the gradient's size, which would show rounding; with this epsilon it hardly does. The
# gradients are clipped at every step.
SMOOTH = {
    "flat_sigma": 0.0,
    "learning_rate": 0.1,
    "text_encoder_lr": 0.1,
    "adam_epsilon": 1e-2,
    "max_grad_norm": 1e-2,
    "max_train_steps": 3,
}


def in_processes(work: Callable[[int], Any], count: int = 2, **environment: str) -> list[Any]:
    """Call `work(rank)` in processes that know each other; what each returned (as JSON), by rank.

    A failure in one fails the test; processes that wait for each other forever are ended after two minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_work, (count, folder, environment, work), nprocs=count, start_method="fork")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]


def _work(rank: int, count: int, folder: str, environment: dict[str, str], work: Callable) -> None:
    signal.alarm(120)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    Path(folder, str(rank)).write_text(json.dumps(work(rank)))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        error = ((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def stop_and_resume(config: TrainConfig, tmp_path: Path) -> None:
    """A whole run into `whole`, and one that a signal stops after step 3 and that goes on, into `0`.

    The second process doesn't see the first one's disk, as on another machine: it would write into `1`.
    """
    in_processes(lambda rank: train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))

    class Stop(Callback):
        def backward(self, run: TrainingRun, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
            if run.step == 2 and run.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return compute()

    def stopped(rank):
        with pytest.raises(RunInterruptedError, match=r"stopped after step 3 .* the same launcher"):
            train(dataclasses.replace(config, output_dir=str(tmp_path / str(rank))), callbacks=[Stop()])

    in_processes(stopped)
    on = dataclasses.replace(config, resume_from_checkpoint="latest")
    in_processes(lambda rank: train(dataclasses.replace(on, output_dir=str(tmp_path / str(rank)))))
    # The finished run is known to be so by both.
    in_processes(lambda rank: train(dataclasses.replace(on, output_dir=str(tmp_path / str(rank)))))
