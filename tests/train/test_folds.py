"""Folds: which images are held out, the number of steps that is found, the run that follows, and kills."""

import csv
import dataclasses
import json
import logging
import math
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Sample, find_samples
from flatlora_diffusion.flat.noise import sigma_at
from flatlora_diffusion.output.checkpoint import Stored
from flatlora_diffusion.output.folds import Folds, read_folds, verdict
from flatlora_diffusion.output.reading import find_runs
from flatlora_diffusion.train import loop
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.folds import split
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.loop import Run
from tests.tiny import assert_equal, run

LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture
def config(config) -> TrainConfig:
    return dataclasses.replace(config, folds=2, heldout_steps=1, max_train_steps=4)


@pytest.fixture
def known(monkeypatch):
    """Held-out losses that are known beforehand: of two folds the mean is lowest after step 2."""
    losses = iter((0.5, 0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.7))
    monkeypatch.setattr(Learner, "heldout_loss", lambda learner: next(losses))


class Watch(Callback):
    """Notes which run calls, and the strength of the noise; stops like Ctrl-C in a step of one of them."""

    def __init__(self, folder: str = "", step: int = 0):
        self.sigmas, self.stop = {}, (folder, step)

    def on_step_end(self, run):
        self.sigmas.setdefault(run.output.name, []).append(run.sigma)
        if (run.output.name, run.step) == self.stop:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("count", "folds"), [(4, 2), (7, 3), (5, 5)])
def test_every_image_is_held_out_once_and_trained_in_all_other_folds(count, folds):
    samples = [Sample(Path(str(index)), "a icon", 1 + index) for index in range(count)]
    parts = split(samples, folds, seed=3)
    assert sorted(sample.repeats for _, heldout in parts for sample in heldout) == list(range(1, count + 1))
    for trained, heldout in parts:
        assert sorted([*trained, *heldout], key=lambda sample: sample.repeats) == samples
        assert count // folds <= len(heldout) <= math.ceil(count / folds)
    assert parts == split(samples, folds, seed=3)
    assert any(parts != split(samples, folds, seed=seed) for seed in range(4))


def test_the_mean_counts_every_image_once_and_its_lowest_step_is_found():
    found = Folds(6, (1, 3), ({2: 4.0, 4: 1.0, 6: 3.0}, {2: 2.0, 4: 3.0}))
    assert found.mean == {2: 2.5, 4: 2.5}
    assert (found.best_step, found.best_loss) == (2, 2.5), "of equal ones the first"
    assert "lowest after step 2 of 6 (2.5; 2.5 after step 4)" in found.sentence("LoRA")
    falling = Folds(2, (1,), ({1: math.nan, 2: 1.0},))
    assert falling.best_step == 2
    assert "(1); it was still falling, so a larger --max_train_steps" in falling.sentence("LoRA")
    with pytest.raises(UserError, match="no step at which all folds have a held-out loss"):
        _ = Folds(2, (1, 1), ({1: 1.0}, {2: 1.0})).best_step


def test_the_average_counts_where_its_lowest_mean_is_not_above_that_of_the_adapter_itself(tmp_path):
    averaged = Folds(4, (1, 3), ({1: 5.0, 2: 1.0}, {1: 3.0, 2: 1.0}), averaged=True)
    live = Folds(4, (1, 3), ({1: 6.0, 2: 9.0}, {1: 2.0, 2: 9.0}))
    found = averaged.or_better(live)
    assert (found.averaged, found.best_step, found.best_loss) == (True, 2, 1.0)
    assert found.sentence("LoRA").endswith(
        "The average (--use_ema) was better than the adapter itself (3 after step 1)."
    )
    assert averaged.or_better(dataclasses.replace(averaged, averaged=False)).averaged, "of equal ones"
    worse = Folds(4, (1, 3), ({1: 7.0}, {1: 7.0}), averaged=True)
    found = worse.or_better(live)
    assert (found.averaged, found.best_step, found.best_loss) == (False, 1, 3.0)
    assert found.sentence("LoRA").endswith(
        "The adapter itself was better than its average (7 after step 1), so --use_ema is left off."
    )
    never = Folds(4, (1, 3), ({1: math.nan}, {}), averaged=True)
    assert averaged.or_better(never) == averaged and never.or_better(live) == live
    (tmp_path / "folds").mkdir()
    found.write(tmp_path)
    assert read_folds(tmp_path) == found
    assert (tmp_path / "folds" / "curves.csv").read_text().splitlines()[:2] == [
        'step,fold 1,fold 2,mean,"fold 1, average","fold 2, average","mean, average"',
        "1,6.0,2.0,3.0,7.0,7.0,7.0",
    ]


def test_methods_are_judged_each_after_its_best_step():
    plain = Folds(2, (1, 1), ({1: 3.0, 2: 4.0}, {1: 1.0, 2: 4.0}))
    flat = Folds(2, (1, 1), ({1: 9.0, 2: 2.0}, {1: 9.0, 2: 1.5}))
    assert verdict({"LoRA": plain, "Flat-LoRA": flat}) == (
        "Images that weren't trained like Flat-LoRA better "
        "(LoRA 2 after step 1, Flat-LoRA 1.75 after step 2), in 1 of 2 folds."
    )


def test_all_images_are_trained_for_the_steps_that_were_found(config, known, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = run(config, flat_schedule="constant")
    output = tmp_path / "run"
    assert read_facts(output / WEIGHTS_NAME)["steps"] == 2
    told = (
        "2 folds of Flat-LoRA: the loss of images that weren't trained was lowest after step 2 of 4 "
        "(0.3; 0.45 after step 4)."
    )
    assert told in caplog.messages and told in (output / "README.md").read_text()
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["images"], "stopped_when_worse" in summary) == (2, 4, False)
    assert summary["folds"] == {
        "number": 2,
        "best_step": 2,
        "heldout_loss": pytest.approx(0.3),
        "last_step": 4,
        "last_heldout_loss": pytest.approx(0.45),
    }
    for fold in ("1", "2"):
        alone = json.loads((output / "folds" / fold / "summary.json").read_text())
        assert (alone["steps"], alone["images"]) == (4, 2)
    assert read_folds(output).curves[0] == {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2}
    with (output / "folds" / "curves.csv").open() as table:
        header, *rows = csv.reader(table)
    assert header == ["step", "fold 1", "fold 2", "mean"] and rows[1] == ["2", "0.1", "0.5", "0.3"]
    (found,) = find_runs(output).values()
    assert list(found.read().folds) == ["mean of 2 folds", "fold 1", "fold 2"] and not found.read().gaps
    plain = {"folds": None, "max_train_steps": 2, "output_dir": str(tmp_path / "plain")}
    assert_equal(tensors, run(config, flat_schedule="constant", **plain))


@pytest.mark.parametrize(
    ("averages", "itself", "steps"), [(3.0, 2.0, 2), pytest.param(1.0, 2.0, 3, marks=pytest.mark.slow)]
)
def test_the_last_run_averages_where_the_folds_like_it(
    config, tmp_path, monkeypatch, averages, itself, steps
):
    config = dataclasses.replace(config, flat_schedule="constant", ema_decay=0.5)
    of_average, of_adapter = (
        [averages + step for step in (2, 1, 0, 3)],
        [itself + step for step in (2, 0, 1, 3)],
    )
    losses = iter(
        [loss for _ in range(2) for pair in zip(of_average, of_adapter, strict=True) for loss in pair]
    )
    monkeypatch.setattr(Learner, "heldout_loss", lambda learner: next(losses))
    tensors = run(config, use_ema=True)
    found, output = read_folds(tmp_path / "run"), tmp_path / "run"
    assert (found.averaged, found.best_step) == (averages < itself, steps)
    assert found.sentence("Flat-LoRA") in (output / "README.md").read_text()
    (shown,) = find_runs(output).values()
    assert shown.read().average == found.comparison() is not None
    summary = json.loads((output / "summary.json").read_text())
    assert summary["settings"]["use_ema"] is summary["folds"]["averaged"] is found.averaged
    other = {"best_step": 5 - steps, "heldout_loss": max(averages, itself)}
    assert summary["folds"]["other"] == other
    plain = {"folds": None, "max_train_steps": steps, "output_dir": str(tmp_path / "plain")}
    assert_equal(tensors, run(config, use_ema=found.averaged, **plain))


@pytest.mark.slow
def test_the_adapter_itself_is_measured_beside_its_average(config, tmp_path):
    config = dataclasses.replace(config, learning_rate=1e-2)
    run(config)
    averaging = dataclasses.replace(config, use_ema=True, output_dir=str(tmp_path / "again" / "run"))
    with pytest.raises(RunInterruptedError):
        run(averaging, [Watch("2", 2)], **LATEST)
    run(averaging, **LATEST)
    found = read_folds(tmp_path / "again" / "run")
    assert {found.averaged, found.other.averaged} == {True, False}
    live = found.other if found.averaged else found
    assert live.curves == read_folds(tmp_path / "run").curves


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_part_goes_on_to_the_same_bits(config, tmp_path):
    config = dataclasses.replace(config, learning_rate=1e-2, flat_sigma=1.0)
    watch = Watch()
    whole = run(config, [watch])
    sigmas = [sigma_at(1.0, step, 4, "cosine") for step in range(4)]  # also where it ends before them
    steps = read_facts(tmp_path / "run" / WEIGHTS_NAME)["steps"]
    assert watch.sigmas == {"1": sigmas, "2": sigmas, "run": sigmas[:steps]}
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again" / "run"))
    for place in (("1", 2), ("2", 3), ("run", 1)):
        with pytest.raises(RunInterruptedError, match="stopped after step"):
            run(again, [Watch(*place)], **LATEST)
    assert_equal(run(again, **LATEST), whole)
    curves = "folds/curves.json"
    assert (tmp_path / "again" / "run" / curves).read_bytes() == (tmp_path / "run" / curves).read_bytes()
    watch = Watch()
    run(again, [watch], **LATEST)
    assert not watch.sigmas, "all of it is complete"


@pytest.mark.slow
def test_repeats_class_images_and_both_methods(config, icons, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (icons / "3_more").mkdir()
    Image.new("RGB", (16, 16), "navy").save(icons / "3_more" / "navy.png")
    (tmp_path / "class").mkdir()
    Image.new("RGB", (16, 16), "olive").save(tmp_path / "class" / "olive.png")
    config = dataclasses.replace(
        config,
        folds=2,
        kohya_folders=True,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a thing",
        num_class_images=1,
        compare=True,
        num_validation_images=0,
        max_train_steps=3,
        train_batch_size=1,
    )
    train(config)
    plain, flat = (read_folds(tmp_path / "run" / name) for name in ("lora", "flat_lora"))
    assert plain.images == flat.images == (3, 2)
    assert verdict({"LoRA": plain, "Flat-LoRA": flat}) in caplog.messages
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2 folds of LoRA" in card and "2 folds of Flat-LoRA" in card and "better (" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"folds": 1}, "--folds 1: must be 2 or more"),
        ({"heldout_data_dir": "x"}, "--folds with --heldout_data_dir: both say what is held out"),
        ({"stop_when_worse": 2}, "--folds with --stop_when_worse: the mean needs curves of one length"),
        ({"resume_from_checkpoint": "checkpoint-2"}, "every fold has checkpoints of its own; give latest"),
        (
            {"heldout_steps": 2},
            "in 4 steps .* measured 2 times, .*--heldout_steps 1$",
        ),
        (
            {"max_train_steps": 2},
            "in 2 steps .* measured 2 times, .*; train for longer",
        ),
        ({"folds": 5}, "--folds 5: there are only 4 images to train; give at most 4"),
        ({"max_train_steps": None}, "in 2 steps .* measured 2 times"),
    ],
)
def test_what_shows_nothing_is_refused_in_one_line(config, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "differences", "said"),
    [
        (4, {}, "checkpoint-4 has 4 steps, and the folds have found 2; give another --output_dir"),
        (2, {"seed": (1, 3)}, "checkpoint-2 has 2 steps, with other settings (seed 1 then and 3 now), and "),
    ],
)
def test_a_checkpoint_beyond_what_was_found_is_refused(config, icons, monkeypatch, step, differences, said):
    found = Folds(4, (4,), ({1: 2.0, 2: 1.0, 3: 2.0},))
    stored = Stored(Path(f"checkpoint-{step}"), step, {}, {}, differences)
    monkeypatch.setattr(loop, "find_checkpoint", lambda *_: stored)
    config = dataclasses.replace(config, resume_from_checkpoint="latest")
    following = Run(config, find_samples(icons, "a icon"), found=found)
    with pytest.raises(UserError, match=re.escape(said)):
        following.train()
