"""`--preset icons` and `--dry_run`: what is chosen and why, the file of it, a plan that leaves nothing."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks.bases import SDXL
from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.command_line import parse_command, parse_train_config, read_config_file
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output.names import PRESET
from flatlora_diffusion.sdxl.size import SDXL_PARAMETERS, unet_parameters
from flatlora_diffusion.train.__main__ import main
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.memory import BESIDE, HALF, SINGLE, Room, step_memory
from flatlora_diffusion.train.plan import Trial
from flatlora_diffusion.train.plan import _duration as duration
from flatlora_diffusion.train.plan import _time as plan_time
from flatlora_diffusion.train.preset import Preset, Surroundings, choose, is_as_written
from flatlora_diffusion.train.tried import Tried, time_picture
from tests.tiny import assert_equal, build_unet, stop_after

NEEDED = {"pretrained_model_name_or_path": "b", "instance_data_dir": "i", "instance_prompt": "a icon"}


def card(gib, bf16=True):
    return Room(gib, "a card", "cuda", bf16)


def chosen(room=None, *, pictures=23, side=1024, share=1.0, native=1024, processes=1, **given):
    around = Surroundings(pictures, [side] * 3, native, share, room or card(22.5), processes)
    choices = choose(TrainConfig(**NEEDED, **given), given.keys(), around)
    assert not {choice.name for choice in choices} & given.keys(), "what was given stays"
    assert all(choice.why for choice in choices)
    found = {choice.name: choice.value for choice in choices}
    TrainConfig(**NEEDED, **(found | given))  # they go together
    return found


def test_a_step_takes_what_the_rehearsal_computed():
    usual = {"samples": 1, "resolution": 1024, "half": True, "checkpointing": False, "noisy": True}
    assert step_memory(**usual) == pytest.approx(HALF.unet + HALF.flat + BESIDE)
    assert step_memory(**usual | {"half": False, "samples": 2}) == pytest.approx(9.59 + 2 * 10.40 + BESIDE)
    assert step_memory(**usual | {"checkpointing": True}) == pytest.approx(4.80 + 0.54 + 0.22 + BESIDE)
    half_side = usual | {"resolution": 512, "noisy": False}
    assert step_memory(**half_side) == pytest.approx(4.80 + 7.18 / 4 + BESIDE)
    assert step_memory(**usual | {"quantised": "4bit"}) == pytest.approx(1.20 + 6.74 + BESIDE)
    assert SINGLE.unet == pytest.approx(2 * HALF.unet, rel=0.01)


def test_the_settings_of_the_results_where_there_is_room():
    assert chosen() == {
        "resolution": 1024,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_train_steps": 500,
        "learning_rate": 1e-4,
        "use_ema": True,
        "ema_decay": 0.99,
        "mixed_precision": "bf16",
    }


@pytest.mark.parametrize(
    ("gib", "side", "checkpointing"),
    [(15.0, 1024, False), (11.0, 1024, True), (7.2, 1024, True), (6.9, 896, True)],
)
def test_memory_decides_checkpointing_and_then_the_size(gib, side, checkpointing):
    found = chosen(card(gib))
    assert (found["resolution"], found["gradient_checkpointing"]) == (side, checkpointing)


def test_what_fits_nowhere_is_said(caplog):
    found = chosen(card(4.0))
    assert (found["resolution"], found["gradient_checkpointing"], found["train_batch_size"]) == (512, True, 1)
    assert "may not fit; --quantize_base 4bit" in caplog.text


@pytest.mark.parametrize(
    ("pictures", "steps", "a_step"), [(5, 250, 1), (60, 1305, 1), (100, 1087, 2), (1000, 1500, 4)]
)
def test_the_pictures_decide_the_steps(pictures, steps, a_step):
    found = chosen(pictures=pictures)
    assert found["max_train_steps"] == steps
    assert found["train_batch_size"] * found["gradient_accumulation_steps"] == a_step


def test_small_pictures_are_not_enlarged_beyond_half_of_the_base():
    assert [chosen(side=side)["resolution"] for side in (2000, 1000, 800, 512, 128)] == [
        1024,
        896,
        768,
        512,
        512,
    ]
    assert [chosen(side=side, native=64)["resolution"] for side in (64, 50, 8)] == [64, 48, 32]


def test_what_is_given_decides_the_rest():
    assert chosen(train_batch_size=4)["max_train_steps"] == 250
    assert chosen(card(15.0), train_batch_size=2)["gradient_checkpointing"] is True
    found = chosen(gradient_accumulation_steps=4)
    assert found["train_batch_size"] == 1
    assert "max_train_steps" not in chosen(num_train_epochs=3)
    assert chosen(card(6.0), resolution=512)["gradient_checkpointing"] is True
    assert "ema_decay" not in chosen(use_ema=False)
    assert "use_ema" not in chosen(train_text_encoder=True, train_text_encoder_frac=0.5)
    assert chosen(optimizer="prodigy")["learning_rate"] == 1.0
    assert chosen(card(15.0), with_prior_preservation=True, class_data_dir="c", class_prompt="p")[
        "gradient_checkpointing"
    ]


def test_devices_and_bases(monkeypatch):
    assert chosen(card(22.5, bf16=False))["mixed_precision"] == "fp16"
    assert chosen(Room(60.0, "the machine", "cpu"))["mixed_precision"] == "no"
    assert chosen(share=0.005)["learning_rate"] == 1e-3
    found = chosen(processes=8)
    assert (found["train_batch_size"], found["gradient_accumulation_steps"], found["max_train_steps"]) == (
        1,
        1,
        250,
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert chosen()["mixed_precision"] == "fp16"


def test_the_size_of_a_base_is_known_before_it_is_loaded(base_path):
    assert unet_parameters(str(base_path)) == sum(p.numel() for p in build_unet(slim=True).parameters())
    with torch.device("meta"):
        assert UNet2DConditionModel(**SDXL.unet).num_parameters() == SDXL_PARAMETERS


def flags(config, *more):
    """The command line of the tiny run."""
    names = (
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "instance_prompt",
        "output_dir",
        "report_to",
        "seed",
    )
    given = [word for name in names for word in (f"--{name}", str(getattr(config, name)))]
    return [*given, "--preset", "icons", *more]


def test_the_file_repeats_the_run_and_a_changed_one_is_kept(config):
    command = parse_command(
        flags(config, "--max_train_steps", "2", "--validation_prompt", "a icon: #1", 'é "two"')
    )
    assert (command.preset, command.dry_run) == ("icons", False)
    file = Path(config.output_dir, PRESET)
    given = TrainConfig(**command.given | {"num_validation_images": 0})
    train(given, preset=Preset("icons", command.given | {"num_validation_images": 0}))
    text = file.read_text()
    assert is_as_written(file.read_bytes()) and "# Chosen:" in text and "resume" not in text
    assert (
        "resolution: 16  # the base was made for 16, and the pictures' shorter side has 24 (median)" in text
    )
    known = yaml.safe_load(text)
    assert known["validation_prompt"] == ["a icon: #1", 'é "two"'] and known["max_train_steps"] == 2
    again = parse_train_config(["--config", str(file)])
    assert again.use_ema and again.ema_decay == 0.99 and again.resolution == 16
    first = load_file(f"{config.output_dir}/{WEIGHTS_NAME}")
    train(dataclasses.replace(again, output_dir=f"{config.output_dir}-2"))
    assert_equal(load_file(f"{config.output_dir}-2/{WEIGHTS_NAME}"), first)

    file.write_text(text.replace("ema_decay: 0.99", "ema_decay: 0.9"))
    changed = file.read_bytes()
    with pytest.raises(
        UserError, match=r"preset\.yaml was changed since .*--config .*preset\.yaml in place of"
    ) as error:
        train(given, preset=Preset("icons", command.given))
    assert "\n" not in str(error.value) and file.read_bytes() == changed


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_settings_of_its_file(config, monkeypatch):
    given = parse_command(flags(config, "--max_train_steps", "3")).given
    whole = given | {"output_dir": f"{config.output_dir}-whole"}
    train(TrainConfig(**whole), preset=Preset("icons", whole))
    preset = Preset("icons", given)
    stop_after(TrainConfig(**given), 1, preset=preset)
    file = Path(config.output_dir, PRESET)
    monkeypatch.setattr("flatlora_diffusion.train.preset.choose", lambda *_: pytest.fail("chosen anew"))
    file.write_text(file.read_text() + "checkpointing_steps: 2\n")
    given["resume_from_checkpoint"] = "latest"
    train(TrainConfig(**given), preset=Preset("icons", given))
    assert_equal(*(load_file(f"{own['output_dir']}/{WEIGHTS_NAME}") for own in (whole, given)))
    assert read_config_file(file)["checkpointing_steps"] == 2


def everything_below(*folders):
    return sorted(str(path) for folder in folders for path in Path(folder).rglob("*"))


EVERYTHING = (
    "--max_train_steps=9 --compare --resolution=16 --heldout_data_dir=ICONS --train_text_encoder "
    "--with_prior_preservation --class_data_dir=ICONS-2 --class_prompt=a --num_class_images=5"
)
FOLDED = "--folds=2 --max_train_steps=3 --resolution=16 --heldout_steps=1 --use_ema"


@pytest.mark.parametrize("more", ["--preset=icons", FOLDED, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
def test_a_plan_is_printed_and_nothing_written(config, icons, tmp_path, monkeypatch, capsys, more):
    words = more.replace("ICONS", str(icons)).split()
    argv = ["train", *flags(config)[:-2], *words, "--dry_run"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(tmp_path)
    before = everything_below(tmp_path)
    main()
    assert everything_below(tmp_path) == before and not Path(os.environ["FLATLORA_CACHE"]).exists()
    told = capsys.readouterr().out
    assert "pictures   4 of 24 px (shorter side), shown as 16 x 16" in told
    steps = 2 if "folds" in more else 3
    assert f"s a step here, the median of {steps}" in told and "nothing has been written" in told
    if "preset" in more:
        assert "steps      250, with a batch of 1 (1 at once" in told and ": 62.5 epochs of 4" in told
    elif "folds" in more:
        assert "folds      2 runs of 3 steps, each without 2 of the pictures; then one with all" in told
        assert re.search(
            r"time       at most about .* s of held-out losses, .* of loading the base 3 times$", told, re.M
        )
    else:
        assert "class      5 images are drawn first; not counted" in told
        assert "LoRA       sigma 0," in told and "Flat-LoRA  sigma 0.1," in told and "4 held out" in told
        assert "steps      9, with a batch of 4 (4 at once, 1 accumulated, 1 process)" in told


def test_a_plan_refuses_what_training_does(config, monkeypatch):
    for words, said in (
        (("--lora_layers", "to_z"), "--lora_layers to_z"),
        (("--folds", "2", "--num_train_epochs", "1"), "--folds with --heldout_steps 50: in 4 steps"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *flags(config, "--dry_run", *words)])
        with pytest.raises(UserError, match=said):
            main()
    assert not Path(config.output_dir).exists()


def trial(**changes):
    """100 steps, 10 an epoch; a step takes 2 s, a held-out image 3 s, a picture 5 s and 0.5 s a step."""
    config = TrainConfig(**NEEDED, flat_sigma=0.1, **changes)
    tried = Tried(7.0, [9.0, 2.0, 2.0], 3.0, (5.0, 0.5), 2_000_000)
    return Trial(config, 100, 10, 1, tried, peak=1.0, share=1.0, room=card(8))


DRAWN = {"validation_prompt": ("a", "b"), "num_validation_images": 3, "validation_inference_steps": 20}
DRAWN |= {"final_inference_steps": 10, "validation_epochs": 4}


@pytest.mark.parametrize(
    ("changes", "arms", "heldout", "prompts", "seconds", "uncounted"),
    [
        ({}, 1, 0, 0, {"steps": 200, "loading the base": 7}, None),
        ({"heldout_steps": 30}, 1, 5, 0, {"steps": 200, "held-out losses": 5 * 4 * 3}, None),
        # Three validations of 6 pictures, then those of base and adapter.
        (DRAWN, 1, 0, 2, {"30 pictures": 18 * (5 + 10) + 12 * (5 + 5)}, None),
        (DRAWN, 2, 0, 2, {"60 pictures": (2 * 18 + 6) * 15 + 18 * 10, "loading the base 2 times": 14}, None),
        ({"num_validation_images": 3}, 2, 0, 4, {"36 pictures": 36 * (5 + 0.5 * 25)}, None),
        (
            {"folds": 4, "heldout_steps": 20, "use_ema": True, "checkpointing_steps": 50},
            1,
            9,
            0,
            {"steps, those of folds among them": 5 * 200, "held-out losses": 9 * 5 * 2 * 3},
            "writing 10 checkpoints of 2 MB",
        ),
    ],
)
def test_the_time_of_a_plan_is_that_of_its_parts(changes, arms, heldout, prompts, seconds, uncounted):
    told = plan_time([trial(**changes)] * arms, heldout, prompts)
    for what, count in seconds.items():
        assert f"{duration(count)} of {what}" in told
    whole, parts = told.removeprefix("at most ").split(": ", 1)
    assert told.startswith("at most") == ("folds" in changes) and whole.startswith("about ")
    assert parts.partition("; not counted: ")[2] == (uncounted or "")


def test_the_whole_of_a_plan_is_the_sum():
    assert plan_time([trial(heldout_steps=30)], 5, 0).startswith(f"about {duration(200 + 60 + 7)}: ")
    unknown = trial(heldout_steps=30)
    unknown = dataclasses.replace(
        unknown, tried=dataclasses.replace(unknown.tried, heldout=None, picture=None)
    )
    assert plan_time([unknown], 5, 2).endswith("; not counted: held-out losses, pictures")


def test_a_picture_takes_something_beside_its_denoising(monkeypatch):
    now = [0.0]

    def drawn(config):
        now[0] += 5 + 0.5 * config.validation_inference_steps
        return []

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    config = TrainConfig(**NEEDED, validation_prompt=("a",))
    assert time_picture(drawn, config) == pytest.approx((5, 0.5))
    assert time_picture(lambda config: None, config) is None
