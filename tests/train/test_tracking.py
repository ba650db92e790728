"""Trackers: refused first of all, called as the diffusers script calls them, and given the pictures."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.sheet.files import MANIFEST
from flatlora_diffusion.train import arms, tracking
from flatlora_diffusion.train.afterwards import report_final
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.tracking import Tracked, check_tracker, named


class Noting(GeneralTracker):
    """Notes what it is given, in the place of TensorBoard."""

    name = "tensorboard"
    requires_logging_directory = True
    noted: ClassVar[list] = []

    def __init__(self, project, folder, **settings):
        super().__init__()
        self.noted.append(("project", project, Path(folder).parent.name, *settings.values()))

    tracker = None

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **settings):
        pass

    def log_images(self, values, step, **settings):
        for phase, stack in values.items():
            self.noted.append((phase, stack.shape, step))

    def finish(self):
        self.noted.append(("finished",))


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Noting)
    monkeypatch.setattr(Noting, "noted", [])
    return Noting.noted


@pytest.fixture
def drawn(config):
    return dataclasses.replace(
        config,
        report_to="tensorboard",
        validation_prompt=("a red icon",),
        num_validation_images=2,
        validation_inference_steps=1,
        validation_epochs=1,
        max_train_steps=3,  # an epoch has 2 steps
    )


@pytest.mark.slow
def test_the_final_pictures_are_the_test(drawn, noted):
    train(drawn)
    assert noted == [
        ("project", "dreambooth-lora-sd-xl", "run"),
        ("validation", (2, 16, 16, 3), 0),
        ("test", (2, 16, 16, 3), 1),
        ("finished",),
    ]


@pytest.mark.slow
def test_no_pictures_where_none_are_asked_for(drawn, noted, monkeypatch):
    monkeypatch.setitem(tracking._RUN_NAMES, "tensorboard", "name")
    train(dataclasses.replace(drawn, num_validation_images=0, compare=True, max_train_steps=2))
    output = Path(drawn.output_dir)
    assert noted == [
        ("project", "dreambooth-lora-sd-xl", "lora", "LoRA"),
        ("finished",),
        ("project", "dreambooth-lora-sd-xl", "flat_lora", "Flat-LoRA"),
        ("finished",),
    ]
    assert not list(output.rglob("*.png")) and (output / "README.md").is_file()


def test_the_arms_of_a_comparison_are_told_apart(tmp_path, noted):
    columns = ["base", "LoRA", "Flat-LoRA"]
    for name, colour in zip(columns, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    row = {"prompt": "a fox", "seed": 3, "images": [f"{name}.png" for name in columns]}
    (tmp_path / MANIFEST).write_text(json.dumps({"columns": columns, "rows": [row]}))
    tracked = Tracked([Noting("project", tmp_path / "logs")], 4)
    report_final(tracked, tmp_path, ["LoRA", "Flat-LoRA"])
    assert noted[1:] == [("test LoRA", (1, 8, 8, 3), 4), ("test Flat-LoRA", (1, 8, 8, 3), 4)]


def test_wandb_calls_a_run_by_its_method(monkeypatch):
    PartialState(cpu=True)  # accelerate logs
    started = []
    wandb = SimpleNamespace(init=lambda **settings: started.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    LOGGER_TYPE_TO_CLASS["wandb"](tracking.PROJECT, **named("Flat-LoRA")["wandb"]).start()
    assert started == [{"project": "dreambooth-lora-sd-xl", "name": "Flat-LoRA"}]


@pytest.mark.slow
def test_a_tracker_that_cannot_be_used_is_refused_first_of_all(config, monkeypatch):
    monkeypatch.setattr(arms, "_training_samples", lambda config: pytest.fail("images were read before"))
    with pytest.raises(UserError, match="--report_to comet_ml needs the package comet-ml: pip install"):
        train(dataclasses.replace(config, report_to="comet_ml"))
    with pytest.raises(UserError, match=r"--report_to abacus: accelerate knows no such tracker .*wandb"):
        train(dataclasses.replace(config, report_to="abacus"))


@pytest.mark.parametrize("report_to", [None, "none", "all", "tensorboard"])
def test_what_needs_no_package(report_to):
    check_tracker(report_to)


@pytest.mark.slow
def test_a_tracker_that_cannot_start_leaves_no_noise_on_the_models(config, monkeypatch):
    removed, remove = [], FlatLoRA.remove

    def note(self):
        remove(self)
        removed.append(self)

    def fail(*arguments, **settings):
        raise RuntimeError("no connection")

    monkeypatch.setattr(FlatLoRA, "remove", note)
    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    with pytest.raises(RuntimeError, match="no connection"):
        train(config)
    assert len(removed) == 1
