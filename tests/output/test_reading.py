"""What runs leave behind, read back: real runs of the trainer, finished, stopped and damaged."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import output_lock
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output.reading import exponential_mean, find_runs
from flatlora_diffusion.train.arms import train
from tests.tiny import stop_after
from tests.trained import SIGMA, STEPS

pytest_plugins = ["tests.trained"]


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def cosine(done: int, total: int, sigma: float) -> list[float]:
    """Equation 6 of the paper, at steps 0 to `done` - 1."""
    return [sigma * (1 - math.cos(math.pi * step / total)) / 2 for step in range(done)]


def values(curve) -> list[float]:
    return [value for _, value in curve]


@pytest.mark.slow
def test_the_arms_of_a_comparison(comparison):
    runs = {label: run.read() for label, run in find_runs(comparison).items()}
    assert list(runs) == ["LoRA", "Flat-LoRA"]
    for (label, run), name in zip(runs.items(), ("lora", "flat_lora"), strict=True):
        summary = summary_of(comparison / name)
        assert run.gaps == []
        assert run.finished
        assert run.losses == list(enumerate(summary["losses"], start=1))
        assert len(run.losses) == STEPS
        assert run.heldout == [(int(step), loss) for step, loss in summary["heldout_losses"].items()]
        assert [step for step, _ in run.heldout] == [2, 4, 6]
        assert [(step, path.name) for step, path in run.validation] == [
            (step, f"step-00000{step}.png") for step in (2, 4, 6)
        ]
        assert {path.parents[1] for _, path in run.validation} == {comparison / name}
        assert [path for _, path in run.side_by_side] == [
            comparison / "validation" / f"step-00000{step}.png" for step in (2, 4, 6)
        ]
        assert run.final_comparison == comparison / "comparison.png"
        facts = run.facts
        assert facts["state"] == "finished"
        assert facts["method"] == label
        assert (facts["rank"], facts["alpha"], facts["steps"], facts["images"]) == (4, 4, STEPS, 4)
        assert facts["targets"] == {"unet": ["to_k", "to_out.0", "to_q", "to_v"]}
        assert facts["sha256"] == hashlib.sha256(run.adapter.read_bytes()).hexdigest()
        assert facts["median_seconds_a_step"] == summary["median_seconds_a_step"]
        assert facts["versions"]["torch"] == torch.__version__
    assert values(runs["LoRA"].sigmas) == [0.0] * STEPS
    assert values(runs["Flat-LoRA"].sigmas) == pytest.approx(cosine(STEPS, STEPS, SIGMA))


def test_given_settings_come_first_and_no_folder_is_named(comparison):
    run = find_runs(comparison)["Flat-LoRA"].read()
    settings = run.settings
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert settings.keys() == defaults.keys() - {"hub_token"}
    differ = [settings[name] != defaults[name] for name in settings]
    assert differ == sorted(differ, reverse=True)
    given = list(settings)[: sum(differ)]
    assert {"flat_sigma", "resolution", "instance_prompt"} <= set(given)
    assert not {"rank", "snr_gamma"} & set(given)
    assert settings["instance_data_dir"] == "icons"
    assert settings["heldout_data_dir"] == "heldout"
    assert settings["output_dir"] == "flat_lora"
    assert settings["pretrained_model_name_or_path"] == "tiny-sdxl"
    assert "/" not in json.dumps([settings, run.facts, run.gaps]).replace("</b>", "")


def test_a_checkpoint_to_resume_from_is_given_without_its_folder(comparison, clean_copy):
    folder = clean_copy(comparison / "lora")
    settings = summary_of(folder)["settings"] | {"resume_from_checkpoint": "/home/me/out/checkpoint-2"}
    change_summary(folder, settings=settings)
    (run,) = find_runs(folder).values()
    assert run.read().settings["resume_from_checkpoint"] == "checkpoint-2"


@pytest.mark.slow
def test_a_stopped_run_has_what_its_newest_checkpoint_knows(config, monkeypatch):
    """The sigmas are those that the run itself has logged."""
    logged = {}

    def log(self, numbers, step):
        if "sigma" in numbers:
            logged[step] = numbers["sigma"], numbers["loss"]

    monkeypatch.setattr(Accelerator, "log", log)
    config = dataclasses.replace(config, checkpointing_steps=3)
    stop_after(config, 4)
    (run,) = find_runs(Path(config.output_dir)).values()
    assert run.label == "run"
    assert run.read().adapter is None
    assert not run.read().finished
    assert run.read().gaps == []
    assert [step for step, _ in run.read().losses] == [1, 2, 3, 4]
    assert run.read().losses == [(step, loss) for step, (_, loss) in sorted(logged.items())]
    assert run.read().sigmas == [(step, sigma) for step, (sigma, _) in sorted(logged.items())]
    facts = run.read().facts
    assert (facts["state"], facts["steps"], facts["total_steps"]) == ("unfinished", 4, 6)
    assert (facts["method"], facts["rank"]) == ("Flat-LoRA", 4)
    assert "sha256" not in facts
    assert run.read().settings["learning_rate"] == 1e-3
    assert run.read().settings["lora_alpha"] is None

    newest = Path(config.output_dir) / "checkpoint-4" / "state.json"
    newest.write_text(newest.read_text().replace('"step": 4', '"step": 5'))
    assert run.read().losses == [(step, loss) for step, (_, loss) in sorted(logged.items())][:3]
    assert run.read().gaps == ["checkpoint-4: state.json has changed since it was written"]


@pytest.mark.slow
def test_a_run_that_goes_on_after_its_end_is_unfinished_again(config):
    short = dataclasses.replace(config, flat_schedule="constant", max_train_steps=2, checkpointing_steps=2)
    train(short)
    (run,) = find_runs(Path(config.output_dir)).values()
    assert run.read().finished
    longer = dataclasses.replace(short, max_train_steps=8, resume_from_checkpoint="latest")
    stop_after(longer, 3)
    assert not run.read().finished
    assert run.read().adapter is None
    assert len(run.read().losses) == 3
    assert values(run.read().sigmas) == [0.1] * 3
    # The checkpoint of a longer run that had the folder before is older than the summary.
    state = Path(config.output_dir) / "checkpoint-3" / "state.json"
    os.utime(state, ns=(0, (Path(config.output_dir) / "summary.json").stat().st_mtime_ns - 1))
    assert run.read().finished
    assert len(run.read().losses) == 2


def test_a_comparison_in_progress_shows_the_arm_that_has_not_begun(comparison, tmp_path):
    with (
        output_lock(tmp_path / "out"),
        output_lock(tmp_path / "out/lora"),
        output_lock(tmp_path / "out/flat_lora"),
    ):
        runs = find_runs(tmp_path / "out")
        assert list(runs) == ["LoRA", "Flat-LoRA"]
        assert runs["LoRA"].read().gaps == [
            "no sound checkpoint yet, from which the losses of a run in progress are read"
        ]
        shutil.copytree(comparison / "lora", tmp_path / "out/lora", dirs_exist_ok=True)
        assert len(runs["LoRA"].read().losses) == STEPS
        assert (runs["Flat-LoRA"].read().losses, runs["Flat-LoRA"].read().sigmas) == ([], [])
        shutil.rmtree(tmp_path / "out/lora")
        assert runs["LoRA"].read().gaps == ["the folder has gone"]


def test_a_run_beside_a_comparison_keeps_its_own_label(comparison, clean_copy):
    folder = clean_copy(comparison, "LoRA")
    shutil.copy(comparison / "lora" / "summary.json", folder)
    assert list(find_runs(folder)) == ["LoRA (not compared)", "LoRA", "Flat-LoRA"]


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_summary(folder, **changes) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(summary_of(folder) | changes))


NOT_WRITTEN = "summary.json is not what was written"
HEADER = f"{WEIGHTS_NAME} is not a sound safetensors file"
# name: (what happens to the folder, the gaps, number of losses, whether the run counts as finished)
DAMAGE = {
    "summary cut": (lambda f: cut(f / "summary.json"), [NOT_WRITTEN], 4, True),
    "summary not UTF-8": (lambda f: (f / "summary.json").write_bytes(b"\xff"), [NOT_WRITTEN], 4, True),
    "summary a list": (lambda f: (f / "summary.json").write_text("[]"), [NOT_WRITTEN], 4, True),
    "losses no numbers": (lambda f: change_summary(f, losses=[1, "2"]), [NOT_WRITTEN], 4, True),
    "losses no list": (lambda f: change_summary(f, losses=7), [NOT_WRITTEN], 4, True),
    "memory no number": (lambda f: change_summary(f, peak_memory_bytes="much"), [NOT_WRITTEN], 4, True),
    "held-out steps no numbers": (
        lambda f: change_summary(f, heldout_losses={"a": 1}),
        [NOT_WRITTEN],
        4,
        True,
    ),
    "held-out loss not finite": (
        lambda f: change_summary(f, heldout_losses={"2": float("nan"), "4": 1.0}),
        ["1 of the held-out losses are not finite numbers"],
        6,
        True,
    ),
    "summary gone": (lambda f: (f / "summary.json").unlink(), [], 4, False),
    "adapter cut": (lambda f: cut(f / WEIGHTS_NAME), [HEADER], 6, True),
    "adapter gone": (lambda f: (f / WEIGHTS_NAME).unlink(), [f"{WEIGHTS_NAME} is missing"], 6, True),
    "checkpoint cut": (
        lambda f: cut(f / "checkpoint-4" / "state.json"),
        ["checkpoint-4: state.json is not what was written"],
        6,
        True,
    ),
    "all gone but the adapter": (
        lambda f: [(f / "summary.json").unlink(), shutil.rmtree(f / "checkpoint-4")],
        ["summary.json is missing: losses, time and memory are not known"],
        0,
        True,
    ),
    "a sheet gone": (
        lambda f: (f / "validation" / "step-000004.png").unlink(),
        ["the pictures after step 4 have no sheet"],
        6,
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_gap(name, comparison, clean_copy):
    damage, gaps, losses, finished = DAMAGE[name]
    folder = clean_copy(comparison / "flat_lora")
    whole = summary_of(folder)
    damage(folder)
    (run,) = (run.read() for run in find_runs(folder).values())
    assert run.gaps == gaps
    assert values(run.losses) == whole["losses"][:losses]
    assert run.finished == finished
    assert all(math.isfinite(value) for value in values(run.heldout))
    # However much is missing, the schedule's length is known from what is left.
    assert values(run.sigmas) == pytest.approx(cosine(losses or STEPS, STEPS, SIGMA))
    assert run.settings["flat_sigma"] == SIGMA
    assert run.facts["method"] == "Flat-LoRA"


def test_an_adapter_of_another_trainer(adapters):
    (run,) = (run.read() for run in find_runs(adapters["LoRA"].parent).values())
    assert run.adapter == adapters["LoRA"]
    assert run.facts.keys() == {"state", "sha256"}
    assert (run.losses, run.sigmas, run.settings) == ([], [], {})
    assert f"{WEIGHTS_NAME} says nothing of its making: it is not of this trainer" in run.gaps


@pytest.mark.parametrize(
    "facts",
    [
        {"rank": "<b>4</b>"},
        {"targets": ["to_k"]},
        {"flat_sigma": "0.1", "flat_schedule": "cosine", "steps": 6},
        {"flat_sigma": 0.1, "flat_schedule": ["cosine"], "steps": 6},
        {"flat_sigma": 0.1, "flat_schedule": "cosine", "steps": 10**15},
        {"flat_sigma": float("inf"), "flat_schedule": "cosine", "steps": 6},
        {"flat_sigma": 0.1, "flat_schedule": "cosine", "steps": -6},
        {"flat_sigma": 0.1, "flat_schedule": "cosine"},
        ["a list"],
        7,
    ],
    ids=str,
)
def test_a_header_may_say_anything(facts, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS_NAME, metadata={"flat_lora": json.dumps(facts)})
    (run,) = (run.read() for run in find_runs(tmp_path).values())
    assert run.sigmas == []
    assert run.facts["state"] == "finished"
    assert run.gaps


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text(""), "a file"),
        (lambda path: path.mkdir(), "no run in it"),
        (lambda path: (path / "lora").mkdir(parents=True), "no run in it"),
    ],
)
def test_a_folder_without_a_run_is_refused(prepare, what, tmp_path):
    prepare(tmp_path / "out")
    with pytest.raises(UserError, match=rf"^--run {tmp_path}/out: {what}.*; give the --output_dir") as error:
        find_runs(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_exponential_mean_is_a_weighted_mean():
    losses = np.random.default_rng(0).uniform(size=50)
    for weight in (0.0, 0.5, 0.95):
        for k, mean in enumerate(exponential_mean(list(losses), weight)):
            weights = weight ** np.arange(k, -1, -1)
            assert mean == pytest.approx(np.average(losses[: k + 1], weights=weights))
    assert exponential_mean([], 0.9) == []


def test_smoothing_keeps_the_steps(comparison):
    run = find_runs(comparison)["LoRA"].read()
    assert [step for step, _ in run.smoothed] == [step for step, _ in run.losses]
    assert values(run.smoothed) == exponential_mean(values(run.losses), 0.95)
