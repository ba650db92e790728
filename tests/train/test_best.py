"""The adapter with the lowest held-out loss is kept, also over a resume; --stop_when_worse."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.app.serve import _adapters
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output.reading import find_runs
from flatlora_diffusion.train.best import is_worse
from flatlora_diffusion.train.learner import Learner
from tests.tiny import assert_equal, run, stop_after

LOSSES = (0.5, 0.3, 0.4, 0.45, 0.2, 0.6)


@pytest.fixture
def config(config, icons, monkeypatch) -> TrainConfig:
    """Held-out losses that are known beforehand: after step 2 the lowest of the first four."""
    measured = []

    def heldout_loss(learner: Learner) -> float:
        measured.append(1)
        return LOSSES[(len(measured) - 1) % 6]

    monkeypatch.setattr(Learner, "heldout_loss", heldout_loss)
    return dataclasses.replace(config, heldout_data_dir=str(icons), heldout_steps=1, max_train_steps=4)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("ema", [False, True], ids=["last", "average"])
def test_the_best_adapter_is_the_one_of_a_run_that_ends_there(config, tmp_path, ema):
    config = dataclasses.replace(config, use_ema=ema, flat_sigma=0.0)
    run(config)
    best = tmp_path / "run" / "best" / WEIGHTS_NAME
    assert read_facts(best)["steps"] == 2
    known = summary(tmp_path / "run")["best"]
    assert known == {"step": 2, "heldout_loss": 0.3, "file": f"best/{WEIGHTS_NAME}"}
    assert "lowest after step 2 (0.3)" in (tmp_path / "run" / "README.md").read_text()
    # The page opens with the last two.
    assert list(_adapters(find_runs(tmp_path / "run"), {})) == ["run, step 2 (best held-out loss)", "run"]
    short = {"max_train_steps": 2, "heldout_data_dir": None}
    assert_equal(load_file(best), run(config, output_dir=str(tmp_path / "short"), **short))


def test_the_last_one_is_not_kept_twice(config, tmp_path, monkeypatch):
    run(config)
    monkeypatch.setattr(Learner, "heldout_loss", lambda _: next(falling))
    falling = iter((4.0, 3.0, 2.0, 1.0))
    run(config)
    assert not list((tmp_path / "run" / "best").iterdir())
    assert summary(tmp_path / "run")["best"] == {"step": 4, "heldout_loss": 1.0, "file": WEIGHTS_NAME}


def test_a_stopped_run_keeps_it(config, tmp_path):
    run(config)
    before = load_file(tmp_path / "run" / "best" / WEIGHTS_NAME)
    again = {"output_dir": str(tmp_path / "again")}
    for _ in range(2):  # so that the next measurement is the first loss
        Learner.heldout_loss(None)
    stop_after(config, 3, **again)
    assert not (tmp_path / "again" / "best").exists()
    run(config, resume_from_checkpoint="latest", **again)
    assert_equal(load_file(tmp_path / "again" / "best" / WEIGHTS_NAME), before)
    assert summary(tmp_path / "again")["best"] == summary(tmp_path / "run")["best"]


def test_it_stops_when_it_was_worse_so_often(config, tmp_path, caplog):
    stopped = dataclasses.replace(config, max_train_steps=6, stop_when_worse=2, flat_sigma=0.0)
    tensors = run(stopped)
    assert summary(tmp_path / "run")["steps"] == 4 and summary(tmp_path / "run")["stopped_when_worse"]
    assert read_facts(tmp_path / "run" / WEIGHTS_NAME)["steps"] == 4
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert_equal(tensors, run(stopped, resume_from_checkpoint="latest"))
    assert "is complete already" in caplog.text
    plain = {"heldout_data_dir": None, "output_dir": str(tmp_path / "plain"), "flat_sigma": 0.0}
    assert_equal(tensors, run(config, **plain))


@pytest.mark.parametrize(
    ("losses", "patience", "worse"),
    [
        ((), 1, False),
        ((3, 2, 1), 1, False),
        ((3, 1, 2), 1, True),
        ((3, 1, 2), 2, False),
        ((3, 1, 1, 1), 2, True),
        ((1, math.nan, math.nan), 2, True),
        ((math.nan, 1), 1, False),
        ((3, 1, 2), None, False),
    ],
)
def test_what_worse_is(losses, patience, worse):
    assert is_worse(dict(enumerate(losses)), patience) is worse


def test_it_needs_held_out_images(config):
    with pytest.raises(UserError, match="--stop_when_worse needs held-out images"):
        dataclasses.replace(config, heldout_data_dir=None, stop_when_worse=2)
