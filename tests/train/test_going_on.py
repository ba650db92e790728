"""Going on from a checkpoint with other settings: schedules, what is told and kept, what is refused."""

import dataclasses
from pathlib import Path

import pytest

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.flat.noise import sigma_at
from flatlora_diffusion.output.going_on import consequences
from flatlora_diffusion.output.reading import find_runs
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from tests.tiny import assert_equal, run, stop_after

LATEST = {"resume_from_checkpoint": "latest"}


class Look(Callback):
    """Notes sigma and the learning rate of each step."""

    def __init__(self):
        self.sigmas, self.rates, self.decays = [], [], []

    def backward(self, run, compute):
        self.rates.append(run.optimizer.param_groups[0]["lr"])
        self.decays.append(run.optimizer.param_groups[0]["weight_decay"])
        return compute()

    def on_step_end(self, run):
        self.sigmas.append(run.sigma)


@pytest.fixture
def config(config):
    return dataclasses.replace(config, max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=0)


def test_more_steps_go_on_with_schedules_over_all_of_them(config, caplog):
    run(config, checkpointing_steps=4)
    look = Look()
    run(config, [look], max_train_steps=8, **LATEST)
    assert look.sigmas == [sigma_at(0.1, step, 8, "cosine") for step in range(4, 8)]
    assert look.rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(4, 8)])
    (told,) = [message for message in caplog.messages if "goes on with" in message]
    assert told.endswith(
        "checkpoint-4 goes on with other settings: max_train_steps 4 then and 8 now; sigma follows its "
        "schedule over 8 steps, so it goes on at 0.05 where it would have been 0.1; the learning rate "
        "follows its schedule over 8 steps, so it goes on at 0.0005 where it would have been 0"
    )


def test_more_steps_of_what_is_constant_have_the_bits_of_a_run_never_shorter(config, tmp_path, caplog):
    constant = {"flat_schedule": "constant", "lr_scheduler": "constant"}
    whole = run(config, max_train_steps=6, output_dir=str(tmp_path / "whole"), **constant)
    run(config, checkpointing_steps=4, **constant)
    assert_equal(run(config, max_train_steps=6, **constant, **LATEST), whole)
    assert "other settings" not in caplog.text
    assert "changes" not in read_facts(Path(config.output_dir, WEIGHTS_NAME))


def test_another_rate_and_batch_go_on_and_the_adapter_says_so(config):
    stop_after(config, 2)
    look = Look()
    changed = {"learning_rate": 1e-2, "train_batch_size": 3, "adam_weight_decay": 0.5}
    run(config, [look], **changed, **LATEST)
    assert look.rates == pytest.approx([1e-2 / 2, 1e-2 / 4])
    assert look.decays == [0.5, 0.5]
    said = [
        "from step 2: adam_weight_decay 0.0001 then and 0.5 now",
        "from step 2: learning_rate 0.001 then and 0.01 now",
        "from step 2: train_batch_size 2 then and 3 now",
    ]
    output = Path(config.output_dir)
    assert read_facts(output / WEIGHTS_NAME)["changes"] == said
    assert find_runs(output)
    card = (output / "README.md").read_text()
    assert f"| changed on the way | {'; '.join(said)} |" in card
    done = (output / WEIGHTS_NAME).read_bytes()
    train(dataclasses.replace(config, **changed, **LATEST))  # complete
    assert (output / WEIGHTS_NAME).read_bytes() == done


def test_what_was_changed_is_kept_over_another_stop(config):
    stop_after(config, 1)
    stop_after(dataclasses.replace(config, noise_offset=0.1, **LATEST), 2)
    run(config, noise_offset=0.1, **LATEST)
    facts = read_facts(Path(config.output_dir, WEIGHTS_NAME))
    assert facts["changes"] == ["from step 1: noise_offset 0.0 then and 0.1 now"]


def test_prodigy_keeps_its_estimate_and_takes_the_new_rate(config):
    config = dataclasses.replace(config, optimizer="prodigy", learning_rate=1.0, lr_scheduler="constant")
    stop_after(config, 2)
    estimates = []

    class Estimate(Callback):
        def on_train_begin(self, run):
            estimates.append({name: run.optimizer.param_groups[0][name] for name in ("lr", "k", "d")})

    run(config, [Estimate()], learning_rate=0.5, **LATEST)
    (found,) = estimates
    assert found["lr"] == 0.5 and found["k"] == 2 and found["d"] > 0


def test_a_checkpoint_with_nothing_left_to_do_is_refused(config):
    run(config, checkpointing_steps=2)
    before = Path(config.output_dir, WEIGHTS_NAME).read_bytes()
    with pytest.raises(UserError, match=r"checkpoint-4 has 4 steps, more than the 3 of this run"):
        run(config, max_train_steps=3, **LATEST)
    with pytest.raises(
        UserError, match=r"has all 4 steps done with other settings \(seed 3 then and 4 now\)"
    ):
        run(config, seed=4, **LATEST)
    assert Path(config.output_dir, WEIGHTS_NAME).read_bytes() == before
    changed = run(config, seed=4, resume_from_checkpoint="checkpoint-2")
    assert any(tensor.abs().sum() > 0 for tensor in changed.values())


def test_what_the_differences_mean():
    none = {"sigma": (0.1, 0.1), "rate": (1e-4, 1e-4), "total_steps": 9}
    assert consequences({"snr_gamma": (None, 5.0)}, **none) == []
    assert consequences({"seed": (0, 1)}, **none) == ["the images come in another order from here on"]
