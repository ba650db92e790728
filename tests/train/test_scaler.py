"""Training in fp16 with a gradient scaler, on the CPU, which accelerate itself refuses."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train import loop
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.processes import make_accelerator
from tests.tiny import assert_equal, run


class Spoiling(Callback):
    """Gives gradients that overflow in some steps, and notes what each step was done with."""

    def __init__(self, steps=(), stop=None):
        self.steps, self.stop, self.seen, self.adapters = steps, stop, [], []

    def backward(self, run, compute):
        if run.step == self.stop:
            signal.raise_signal(signal.SIGINT)
        loss = compute()
        trained = [p for p in run.models["unet"].parameters() if p.requires_grad]
        self.adapters.append(torch.cat([p.detach().flatten() for p in trained]))
        if run.step in self.steps:
            trained[-1].grad.fill_(torch.inf)
        return loss

    def on_step_end(self, run):
        (group,) = run.optimizer.param_groups
        self.seen.append((run.sigma, group["lr"]))


@pytest.fixture
def config(config, monkeypatch) -> TrainConfig:
    def with_scaler(config):
        accelerator = make_accelerator(config)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", with_scaler)
    # The tiny base's gradients are small enough for the first scale.
    return dataclasses.replace(config, max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=0)


@pytest.mark.slow
def test_a_step_that_is_skipped_moves_no_schedule_and_no_average_on(config, tmp_path):
    sound, spoiled = Spoiling(), Spoiling(steps=[1])
    run(config, callbacks=[sound])
    config = dataclasses.replace(config, output_dir=str(tmp_path / "spoiled"), use_ema=True, ema_decay=0.5)
    adapter = run(config, callbacks=[spoiled])
    assert torch.equal(spoiled.adapters[1], spoiled.adapters[2])
    assert not torch.equal(spoiled.adapters[2], spoiled.adapters[3])
    (first, second, third, _), (before, skipped, repeated, last) = sound.seen, spoiled.seen
    assert (before, repeated, last) == (first, second, third)
    assert skipped == (second[0], first[1])  # its sigma; the rate is that of the step to come
    summary = json.loads(Path(config.output_dir, "summary.json").read_text())
    assert summary["skipped_steps"] == 1 and len(summary["losses"]) == 4

    config = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    with pytest.raises(RunInterruptedError, match="stopped after step 3 of 4"):
        run(config, callbacks=[Spoiling(steps=[1], stop=2)])
    assert_equal(run(config, resume_from_checkpoint="latest"), adapter)


@pytest.mark.slow
def test_gradients_that_never_become_finite_end_the_run(config, monkeypatch):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    told = r"^the gradient's norm became \w+ in 3 steps in a row at step 3 and nothing was updated with it"
    with pytest.raises(UserError, match=told):
        run(config, callbacks=[Spoiling(steps=range(9))])
    assert not Path(config.output_dir, WEIGHTS_NAME).exists()
