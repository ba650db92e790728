"""The benchmark of quality: its tables by hand, what is missing or damaged, and what trains when."""

import copy
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import adapter_measures, quality, quality_figures, rivals
from benchmarks.adapter_measures import Measures, digest, relative_update, round_weight
from benchmarks.matched import matched, scale_curve
from benchmarks.quality_arms import Arm, make_arms, run_folder
from benchmarks.quality_measures import MEASURED_WITH, PARTS, read_parts, read_runs
from benchmarks.quality_report import report
from benchmarks.quality_runs import change_since
from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.evaluate.merged import filter_norms
from flatlora_diffusion.output.names import SUMMARY
from flatlora_diffusion.train import arms as train_arms

ARMS = {
    "mild-lora": Arm("mild", "LoRA", None),
    "mild-flat": Arm("mild", "Flat-LoRA 0.1", "mild-lora", {"flat_sigma": 0.1}),
    "mild-flat-2": Arm("mild", "Flat-LoRA 0.2", "mild-lora", {"flat_sigma": 0.2}),
    **{f"steps-{n}": Arm("shorter", f"{n} steps", "mild-lora", {"max_train_steps": n}) for n in (125, 250)},
    "ema": Arm("regularisers", "LoRA, EMA", "mild-lora", {"use_ema": True}),
}
SEEDS = range(5)
JITTER = (0.0, 0.01, 0.0, -0.01, 0.0)  # sums to 0
PLAIN = {
    "train_loss": 0.4,
    "heldout_loss": 0.5,
    "retention_loss": 0.25,
    "rise_0.1": 0.1,
    "rise_0.3": 0.2,
    "update_norm": 2.0,
}


def write(work: Path, name: str, seed: int, measures: dict) -> Path:
    path = run_folder(work, name, seed) / "measures.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"losses": measures}))
    return path


def finish(work: Path, name: str, seed: int, **settings: object) -> Path:
    """A run's folder as training leaves it, with some other settings than its arm has."""
    folder = run_folder(work, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_NAME).write_bytes(b"")
    told = make_arms()[name].config(seed, folder, work).settings() | settings
    (folder / SUMMARY).write_text(json.dumps({"settings": told}))
    return folder


def rows(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table after a line that begins so."""
    lines = text[text.index(heading) :].splitlines()[1:]
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    ]
    return [dict(zip(table[0], cells, strict=True)) for cells in table[2:]]


def test_a_table_by_hand(tmp_path):
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        shift = {"clip_i": 0.5, "drift": 0.1}
        write(tmp_path, "mild-lora", seed, PLAIN | {"heldout_loss": 0.5 + seed / 100} | shift)
        flat = PLAIN | {
            "heldout_loss": 0.5 + seed / 100 - 0.052 + jitter,  # the plain arm's mean is 0.52
            "retention_loss": 0.25 + 0.2 * jitter,
            "rise_0.1": 0.15 + jitter,
            "update_norm": 1.5 + jitter,
            "clip_i": 0.45 + jitter,
            "drift": 0.05 + jitter,
        }
        write(tmp_path, "mild-flat", seed, flat)
    text = report(tmp_path, ARMS)
    plain, arm = rows(text, "## Mild")
    assert plain == {
        "arm": "**LoRA**",
        "seeds": "5",
        "training loss": "0.4",
        "held-out loss ↓": "0.52",
        "retention loss ↓": "0.25",
        "rise under noise, sigma 0.1 ↓": "0.1",
        "rise under noise, sigma 0.3 ↓": "0.2",
        "norm of dW": "2",
    }
    # Of the differences' resamples the least, and one in which one least value is replaced, have too little
    # probability to count: the ends are at (4 * 0.01 + 0) / 5 = 0.008 from the mean.
    assert arm == {
        "arm": "Flat-LoRA 0.1",
        "seeds": "5",
        "training loss": "+0.00% [+0.00%, +0.00%]",
        "held-out loss ↓": "-10.00% [-11.54%, -8.46%] better*",
        "retention loss ↓": "+0.00% [-0.64%, +0.64%]",
        "rise under noise, sigma 0.1 ↓": "+50.00% [+42.00%, +58.00%] worse*",
        "rise under noise, sigma 0.3 ↓": "+0.00% [+0.00%, +0.00%]",
        "norm of dW": "-25.00% [-25.40%, -24.60%] lower*",
    }
    second = text.index("CLIP-I ↑")
    _, others = rows(text, text[text.rindex("\n\n", 0, second) + 1 : second])
    assert others["CLIP-I ↑"] == "-0.05 [-0.058, -0.042] worse*"
    assert others["drift ↓"] == "-50.00% [-58.00%, -42.00%] better*"
    assert "1 arms, 8 comparisons" in text
    assert "not measured: mild-flat-2, steps-125, steps-250, ema" in text


def test_a_star_needs_more_where_more_was_compared(tmp_path):
    """Five values with t = 3.14 have p = 0.035: enough for one arm, not for two."""
    shifts = (-0.05, -0.01, -0.03, -0.01, -0.06)
    for seed, shift in zip(SEEDS, shifts, strict=True):
        write(tmp_path, "mild-lora", seed, PLAIN)
        write(tmp_path, "mild-flat", seed, PLAIN | {"heldout_loss": 0.5 + shift})
    assert rows(report(tmp_path, ARMS), "## Mild")[1]["held-out loss ↓"].endswith("better*")
    for seed in SEEDS:
        write(tmp_path, "ema", seed, PLAIN | {"heldout_loss": 0.5 + seed % 2 / 100})
    text = report(tmp_path, ARMS)
    assert rows(text, "## Mild")[1]["held-out loss ↓"].endswith("better")
    plain, ema = rows(text, "## Regularisers")
    assert plain["arm"] == "**LoRA**" and ema["arm"] == "LoRA, EMA"


def test_missing_and_damaged_runs_are_left_out_and_named(tmp_path):
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        write(tmp_path, "mild-lora", seed, PLAIN)
        write(tmp_path, "mild-flat", seed, PLAIN | {"heldout_loss": 0.4 + jitter})
    for seed in (1, 3):
        write(tmp_path, "mild-flat-2", seed, PLAIN | {"heldout_loss": 0.4})
    write(tmp_path, "ema", 0, PLAIN)
    run_folder(tmp_path, "ema", 1).mkdir()
    write(tmp_path, "unknown", 0, PLAIN)
    flat = run_folder(tmp_path, "mild-flat", 0).parent
    (flat / "seed-0" / "measures.json").write_text("{")
    (flat / "seed-1" / "measures.json").write_text("[1]")
    lacking = {name: value for name, value in PLAIN.items() if name != "rise_0.3"}
    damaged = lacking | {"train_loss": float("nan"), "x": "y"}
    (flat / "seed-2" / "measures.json").write_text(json.dumps({"losses": damaged}))
    text = report(tmp_path, ARMS)
    _, arm, other = rows(text, "## Mild")
    assert arm["seeds"] == "3"
    assert arm["held-out loss ↓"] == "-14.00% [-22.00%, +0.00%]"
    assert arm["training loss"] == "+0.00% [+0.00%, +0.00%] (2 seeds)"
    assert other["held-out loss ↓"] == "-20.00% [-20.00%, -20.00%]", "two seeds are too few for a mark"
    assert rows(text, "## Regularisers")[1] == dict.fromkeys(arm, "-") | {"arm": "LoRA, EMA", "seeds": "1"}
    assert text[text.index("## Left out") :].splitlines()[2:] == [
        "- runs/mild-flat/seed-0/measures.json: not JSON; measure that run again",
        "- runs/mild-flat/seed-1/measures.json: not the measures of each part; measure that run again",
        "- runs/mild-flat/seed-2/measures.json: not a finite number: train_loss, x",
        "- runs/mild-flat/seed-2/measures.json: lacks rise_0.3",
        "- not measured: steps-125, steps-250",
    ]


def test_nothing_measured_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no run there has been measured$"):
        report(tmp_path, ARMS)
    write(tmp_path, "ema", 0, PLAIN).write_text("")
    with pytest.raises(UserError, match=r"measured; runs/ema/seed-0/measures\.json: not JSON"):
        report(tmp_path, ARMS)


# At equal retention or training loss.


def retention(scale):
    return 0.25 + 0.1 * scale**2


def heldout(scale):
    return 0.5 - 0.3 * scale + 0.15 * scale**2


def scaled(**more):
    """The measures of a plain run whose losses are parabolas in the scale."""
    measures = dict(more)
    for scale in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2):
        measures[f"scale_{scale}_heldout_loss"] = heldout(scale)
        measures[f"scale_{scale}_retention_loss"] = retention(scale)
    return PLAIN | {"heldout_loss": heldout(1), "retention_loss": retention(1)} | measures


def test_a_smooth_curve_is_met_between_its_points():
    curve = scale_curve(scaled())
    assert sorted(curve) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    point = matched(curve, "retention_loss", retention(0.5), "heldout_loss", "smooth")
    assert point.position == pytest.approx(0.5, abs=1e-5)
    assert point.value == pytest.approx(heldout(0.5), abs=1e-6)
    chord = matched(curve, "retention_loss", retention(0.5), "heldout_loss", "straight")
    assert chord.value - heldout(0.5) > 1e-3, "straight lines would flatter the other arm"


@pytest.mark.parametrize("end", [0.0, 1.2])
def test_a_curve_is_met_at_its_ends_and_nowhere_beyond(end):
    curve = scale_curve(scaled())
    beyond = retention(end) + (1e-9 if end else -1e-9)
    assert matched(curve, "retention_loss", retention(end), "heldout_loss", "smooth").position == end
    assert matched(curve, "retention_loss", beyond, "heldout_loss", "smooth") is None
    assert matched(curve, "train_loss", 0.4, "heldout_loss", "smooth") is None, "it has no such values"


def test_of_several_points_the_best_for_plain_lora_counts():
    curve = {
        0: {"a": 1.0, "b": 5.0},
        1: {"a": 3.0, "b": 4.0},
        2: {"a": 1.0, "b": 9.0},
        3: {"a": 5.0, "b": 1.0},
    }
    point = matched(curve, "a", 2.0, "b", "straight")
    assert (point.position, point.value) == (0.5, 4.5)  # not 6.5 at 1.5, not 7 at 2.25


def test_a_win_that_is_only_a_smaller_update_is_none(tmp_path):
    """One arm is plain LoRA at scale 0.5 in disguise; the other is better than that by 0.01."""
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        write(tmp_path, "mild-lora", seed, scaled())
        disguise = {"retention_loss": retention(0.5), "train_loss": 0.4}
        write(tmp_path, "mild-flat", seed, PLAIN | disguise | {"heldout_loss": heldout(0.5) + jitter / 10})
        better = {"heldout_loss": heldout(0.5) - 0.01 + jitter / 10}
        write(tmp_path, "mild-flat-2", seed, PLAIN | disguise | better)
    first, second = rows(report(tmp_path, ARMS), "Against plain LoRA at")
    held = "held-out loss at equal retention loss ↓"
    assert first[held].lstrip("+-") == "0.00% [-0.21%, +0.21%]"
    assert first["scale of LoRA"] == second["scale of LoRA"] == "0.5"
    # heldout(0.5) = 0.3875: 0.01 of it are 2.58%, 0.0008 are 0.21%.
    assert second[held] == "-2.58% [-2.79%, -2.37%] better*"
    assert second["seeds won"] == "5 of 5"
    assert "held-out loss at equal training loss ↓" not in second, "no curve of it was measured"


def test_fewer_steps_make_a_curve_too(tmp_path):
    arms = ARMS | {"steps-375": Arm("shorter", "375 steps", "mild-lora", {"max_train_steps": 375})}
    losses = {"steps-125": (0.26, 0.45), "steps-250": (0.28, 0.41), "steps-375": (0.32, 0.38)}
    for seed in SEEDS:
        write(tmp_path, "mild-lora", seed, scaled())
        for name, (kept, missed) in losses.items():
            write(tmp_path, name, seed, PLAIN | {"retention_loss": kept, "heldout_loss": missed})
        write(tmp_path, "ema", seed, PLAIN | {"retention_loss": 0.29, "heldout_loss": 0.39})
    text = report(tmp_path, arms)
    # A quarter of the way from 250 to 375 steps: 0.41 - 0.03 / 4 = 0.4025.
    (row,) = rows(text[text.index("## Regularisers") :], "Against plain LoRA at")
    assert row["steps of LoRA"] == "281"
    assert row["held-out loss at equal retention loss ↓"] == "-3.11% [-3.11%, -3.11%] better*"
    assert row["seeds won"] == "5 of 5"
    shorter = text[text.index("## Shorter") : text.index("## Regularisers")]
    assert "steps of LoRA" not in shorter and "scale of LoRA" in shorter


def test_likeness_is_compared_at_equal_drift_where_higher_is_better(tmp_path):
    """Plain LoRA has drift 0.3 * scale and CLIP-I 0.1 + 0.2 * scale."""
    drawn = {"scale_0.0_drift": 0.0, "drift": 0.3, "clip_i": 0.3}
    for scale in (0.6, 0.8, 1.0):
        drawn |= {f"scale_{scale}_drift": 0.3 * scale, f"scale_{scale}_clip_i": 0.1 + 0.2 * scale}
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        write(tmp_path, "mild-lora", seed, PLAIN | drawn)
        alike = {"drift": 0.21, "clip_i": 0.24 + jitter / 10}  # that of scale 0.7
        write(tmp_path, "mild-flat", seed, PLAIN | alike)
        write(tmp_path, "mild-flat-2", seed, PLAIN | alike | {"clip_i": 0.252 + jitter / 10})
    first, second = rows(report(tmp_path, ARMS), "Against plain LoRA at")
    assert first["scale of LoRA"] == second["scale of LoRA"] == "0.7"
    held = "CLIP-I at equal drift ↑"
    assert first[held].lstrip("+-") == "0.00% [-0.33%, +0.33%]"
    assert second[held] == "+5.00% [+4.67%, +5.33%] better*"
    assert second["seeds won"] == "5 of 5"


def test_a_curve_measured_in_another_way_is_not_used(tmp_path):
    for seed in SEEDS:
        write(tmp_path, "mild-lora", seed, scaled() | {"retention_loss": 0.3 if seed == 2 else retention(1)})
        write(tmp_path, "ema", seed, PLAIN | {"retention_loss": retention(0.5)})
    text = report(tmp_path, ARMS)
    assert "- mild-lora seed 2: retention_loss is 0.3, but 0.35 at scale 1: the two were measured" in text
    assert rows(text, "Against plain LoRA at")[0]["seeds won"] == "0 of 4"


def test_eigenvalues_are_told_by_rank(tmp_path):
    """One of a thousand times the others' size moves none but the greatest."""
    for seed, value in zip(SEEDS, (1.5, 1.0, 2.0, 9000.0, 0.5), strict=True):
        write(tmp_path, "mild-lora", seed, PLAIN | {"top_eigenvalue": value})
    for seed, value in zip(range(4), (1.0, 2.0, 1.0, 3.0), strict=True):
        write(tmp_path, "ema", seed, PLAIN | {"top_eigenvalue": value})
    text = report(tmp_path, ARMS)
    assert [list(row.values()) for row in rows(text, "## The Hessian's largest eigenvalue")] == [
        ["LoRA, mild", "5", "0.5", "1.5", "9000", ""],
        ["LoRA, EMA, regularisers", "4", "1", "1.5", "3", "3 of 4"],
    ]


def test_the_demo_arms_have_the_settings_of_the_demo(tmp_path, monkeypatch):
    project = Path(__file__).parents[2]
    monkeypatch.chdir(project)
    demo = parse_train_config(["--config", "assets/demo.yaml"])
    arm = make_arms()["demo-flat-0.3"].config(demo.seed, tmp_path, tmp_path)
    base, icons = project / demo.pretrained_model_name_or_path, project / demo.instance_data_dir
    ours = replace(demo, pretrained_model_name_or_path=str(base), instance_data_dir=str(icons))
    differ = {field.name for field in fields(demo) if getattr(arm, field.name) != getattr(ours, field.name)}
    reports = {"output_dir", "report_to", "compare", "heldout_data_dir"}
    checkpoints = {"checkpointing_steps", "checkpoints_total_limit"}
    assert {name for name in differ if "validation" not in name} == reports | checkpoints


def test_the_noise_is_told_beside_the_update_and_the_loss(tmp_path):
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        strength = {"relative_update": 0.25 + jitter, "rise_0.1": 0.002 + jitter / 100, "rise_0.3": 0.02}
        write(tmp_path, "mild-lora", seed, PLAIN | strength)
    assert rows(report(tmp_path, ARMS), "## How strong the noise is") == [
        {
            "plain arm": "LoRA, mild",
            "dW / W'": "0.250",
            "noise of sigma 0.1 / dW": "0.40",
            "noise of sigma 0.3 / dW": "1.20",
            "rise at 0.1 / training loss": "0.50%",
            "rise at 0.3 / training loss": "5.00%",
        }
    ]


def test_the_noise_is_as_long_as_sigma_says_beside_the_update():
    """Of layers of different sizes: noise as Flat-LoRA draws it, against what is told of it."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(40, 50, 3), nn.Linear(5, 5))
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    merged = copy.deepcopy(base)
    update = noise = 0.0
    for name in ("0", "1"):
        weight = merged.get_submodule(name).weight.data
        change = 0.1 * weight.flip(0) * torch.rand(weight.shape, generator=generator)
        weight += change
        update += change.square().sum().item()
        normals = torch.randn(weight.shape, generator=generator)
        noise += (0.3 * filter_norms(weight) / math.sqrt(weight[0].numel()) * normals).square().sum().item()
    merged.get_submodule("2").weight.data += 100  # a layer that isn't asked for
    told = 0.3 / relative_update(base, merged, ["0", "1"])
    assert told == pytest.approx(math.sqrt(noise / update), rel=0.01)


# The commands.


@pytest.mark.slow
def test_report_is_written_where_asked(tmp_path, capsys):
    for seed in SEEDS:
        for name in ("mild-lora", "mild-flat-0.1", "mild-flat-0.3"):
            write(tmp_path, name, seed, PLAIN)
    quality.main(["report", "--folder", str(tmp_path), "--output", str(tmp_path / "report.md")])
    written = (tmp_path / "report.md").read_text()
    tables = report(tmp_path, make_arms())
    images = (*quality_figures.FORESTS, "sigma", *quality_figures.SCATTERED)
    assert written == tables + "".join(f"\n![{image}]({image}.png)\n" for image in images)
    assert capsys.readouterr().out.strip() == tables.strip()
    assert all((tmp_path / f"{image}.png").is_file() for image in images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["train", "--folder", "x", "--arms", "mild-lora", "nil*"], r"--arms nil\*: no arm is called so"),
        (["train", "--folder", "x", "--seeds", "0"], "--seeds: invalid"),
        (["train", "--folder", __file__], "is a file, not a folder"),
        (["report", "--folder", "x", "--seed", "3"], "unknown argument --seed"),
        (["report", "--folder", "nowhere"], "no run there has been measured"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        quality.main(words)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def forked(monkeypatch):
    """Runs are forked from the test's process, with what it has patched."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(quality.multiprocessing, "get_context", lambda kind: context)


@pytest.mark.slow
def test_failing_runs_are_named_and_the_others_go_on_and_nothing_is_trained_twice(
    forked, tmp_path, monkeypatch, capfd
):
    def train_run(work, task):
        name, seed = task
        with (work / "begun").open("a") as file:
            file.write(f"{name} {seed}\n")
        print("noise", flush=True)
        if name == "mild-lora" and seed == 1:
            raise UserError("no room")
        if name == "ema" and seed == 0:
            raise RuntimeError("a bug")
        if name == "ema" and seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(work, name, seed)

    monkeypatch.setattr(quality, "train_run", train_run)
    words = ["train", "--folder", str(tmp_path), "--seeds", "2", "--jobs", "2"]
    words += ["--arms", "ema", "mild-*lora", "steps-12?"]
    with pytest.raises(SystemExit) as stop:
        quality.main(words)
    assert stop.value.code == 1
    said = capfd.readouterr()
    logs = {
        task: run_folder(tmp_path, *task) / "train.log" for task in (("mild-lora", 1), ("ema", 0), ("ema", 1))
    }
    lines = said.err.splitlines()
    assert sorted(lines[:-1]) == [
        f"ema seed 0 failed: RuntimeError: a bug (see {logs['ema', 0]})",
        f"ema seed 1 failed: ended by SIGKILL (see {logs['ema', 1]})",
        f"mild-lora seed 1 failed: no room (see {logs['mild-lora', 1]})",
    ]
    assert lines[-1].startswith("3 of 6 runs failed: ")
    assert sorted(line.split(":")[0] for line in said.out.splitlines()) == [
        "mild-lora seed 0",
        "steps-125 seed 0",
        "steps-125 seed 1",
    ]
    assert all("noise" in log.read_text() for log in logs.values())
    assert sorted(path.name for path in (tmp_path / "few-icons").iterdir())[-1] == "rocket.png"

    (tmp_path / "begun").unlink()
    with pytest.raises(SystemExit):
        quality.main(words)
    assert sorted((tmp_path / "begun").read_text().splitlines()) == ["ema 0", "ema 1", "mild-lora 1"]
    for name, seed in logs:
        finish(tmp_path, name, seed)
    (tmp_path / "begun").unlink()
    quality.main(words)
    assert not (tmp_path / "begun").exists()


def test_ctrl_c_ends_all_runs_without_a_word_of_theirs(forked, tmp_path, monkeypatch, capfd):
    def train_run(work, task):
        (work / f"pid-{task[1]}").write_text(str(os.getpid()))
        time.sleep(100)

    def interrupt():
        paths = [tmp_path / f"pid-{seed}" for seed in range(2)]
        while not all(path.is_file() and path.read_text() for path in paths):
            time.sleep(0.01)
        for path in paths:  # as a terminal does, which tells all of them
            os.kill(int(path.read_text()), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(quality, "train_run", train_run)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            quality.run_all(quality.training(), tmp_path, [("ema", seed) for seed in range(3)], 2)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, previous)
    for seed in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{seed}").read_text()), 0)
    assert not (tmp_path / "pid-2").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_each_arm_is_trained_by_its_own_method(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_arms, "train", lambda config: seen.append(("plain", config)))
    monkeypatch.setattr(rivals, "train", lambda config, *rival: seen.append((rival, config)))
    for name in ("mild-flat-0.3", "sam-0.2", "lora-sam-0.05", "bi-lora-0.2", "t-lora-0.5"):
        quality.train_run(tmp_path, (name, 4))
    kinds, configs = zip(*seen, strict=True)
    assert kinds == ("plain", ("sam", 0.2), ("lora-sam", 0.05), ("bi-lora", 0.2), ("t-lora", 0.5))
    assert [config.flat_sigma for config in configs] == [0.3, 0, 0, 0, 0]
    assert {config.seed for config in configs} == {4}
    assert configs[0].output_dir == str(tmp_path / "runs" / "mild-flat-0.3" / "seed-4")


@pytest.mark.slow
def test_only_finished_runs_are_measured_and_only_what_is_missing(forked, tmp_path, monkeypatch, capfd):
    def measure_run(work, task, parts):
        folder = run_folder(work, *task)
        found = {part: {MEASURED_WITH: digest(part), "x": 1.0} for part in parts}
        (folder / "measures.json").write_text(json.dumps(found))

    monkeypatch.setattr(quality, "measure_run", measure_run)
    for task in (("mild-lora", 0), ("mild-lora", 1), ("ema", 0), ("ema", 1)):
        finish(tmp_path, *task)
    (run_folder(tmp_path, "ema", 1) / SUMMARY).unlink()

    def measured(*more: str) -> list[str]:
        quality.main(["measure", "--folder", str(tmp_path), "--arms", "mild-lora", "ema", *more])
        return sorted(line.split(":")[0] for line in capfd.readouterr().out.splitlines())

    common = ("--parts", "losses", "rounded")
    assert measured(*common) == ["ema seed 0", "mild-lora seed 0", "mild-lora seed 1"]
    assert measured(*common) == []
    assert measured() == ["mild-lora seed 0", "mild-lora seed 1"]  # drawn too: it is a featured arm
    assert measured() == []
    stale = run_folder(tmp_path, "ema", 0) / "measures.json"
    os.utime(stale, (1, 1))  # the adapter was trained again since
    assert measured() == ["ema seed 0"]
    (run_folder(tmp_path, "mild-lora", 1) / "measures.json").write_text("{")
    assert measured("--parts", "losses") == ["mild-lora seed 1"]
    (run_folder(tmp_path, "ema", 0) / "measures.json").write_text(json.dumps(PLAIN))  # without its constants
    assert measured("--parts", "losses") == ["ema seed 0"]
    monkeypatch.setitem(adapter_measures.CONSTANTS, "losses", (1, 2))
    assert measured() == ["ema seed 0", "mild-lora seed 0", "mild-lora seed 1"]


def test_a_part_with_other_constants_is_measured_anew_and_nothing_of_it_is_kept(tmp_path, monkeypatch):
    class Fake(Measures):
        def __init__(self):
            self.calls = []

        def losses(self, arm, folder):
            self.calls.append("losses")
            (sigma,) = adapter_measures.CONSTANTS["losses"]
            return {f"rise_{sigma}": 1.0}

        def scales(self, arm, folder):
            self.calls.append("scales")
            return {"scale_0.8_train_loss": 2.0}

        def rounded(self, arm, folder):
            self.calls.append("rounded")
            return {"rounded_all_4_heldout_loss": 3.0}

    arm = make_arms()["batch-lora"]  # over scales, not featured
    folder, fake = finish(tmp_path, "batch-lora", 0), Fake()
    for constants in ((0.1,), (0.1,), (0.2,)):
        monkeypatch.setitem(adapter_measures.CONSTANTS, "losses", constants)
        fake.measure(arm, folder, PARTS)
    assert fake.calls == ["losses", "scales", "rounded", "losses"]
    runs, _ = read_runs(tmp_path, {"batch-lora": arm})
    assert runs["batch-lora"][0] == {
        "rise_0.2": 1.0,
        "scale_0.8_train_loss": 2.0,
        "rounded_all_4_heldout_loss": 3.0,
    }


def test_rounded_weights_have_few_values():
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for bits in (3, 4, 8):
        found = round_weight(weight, bits)
        step = weight.flatten(1).abs().amax(1).view(-1, 1, 1, 1) / (2 ** (bits - 1) - 1)
        levels = found / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert ((found - weight).abs() <= 0.5001 * step).all() and not torch.equal(found, weight)
        torch.testing.assert_close(found.flatten(1).abs().amax(1), weight.flatten(1).abs().amax(1))
    assert torch.equal(round_weight(torch.zeros(2, 3), 4), torch.zeros(2, 3))


def test_runs_measured_at_a_time_draw_into_folders_of_their_own(tmp_path, monkeypatch):
    """The base's pictures as well, which are the same for all."""
    folders = []

    def drawer(pipeline, base, adapters, drawing, folder, batch_size):
        folders.append(folder)
        raise UserError("enough")

    class Fake(Measures):
        def __init__(self):
            self._work, self._base, self._pipeline = tmp_path, "base", mock.Mock()

    monkeypatch.setattr(adapter_measures, "load_adapter", lambda pipeline, name, folder: None)
    monkeypatch.setattr(adapter_measures, "Drawer", drawer)
    for task in (("mild-lora", 0), ("mild-lora", 1), ("mild-flat-0.3", 0)):
        with pytest.raises(UserError, match="enough"):
            Fake().drawn(make_arms()[task[0]], run_folder(tmp_path, *task))
    assert len(set(folders)) == 3 and all(folder.is_relative_to(tmp_path / "pictures") for folder in folders)


def test_a_run_retrained_since_it_was_measured_is_left_out_and_named(tmp_path):
    """By the report as by the measuring."""
    for seed in SEEDS:
        write(tmp_path, "mild-lora", seed, PLAIN)
        write(tmp_path, "ema", seed, PLAIN)
    stale = run_folder(tmp_path, "ema", 3)
    (stale / WEIGHTS_NAME).write_bytes(b"")
    os.utime(stale / "measures.json", (1, 1))
    text = report(tmp_path, ARMS)
    assert rows(text, "## Regularisers")[1]["seeds"] == "4"
    assert "- runs/ema/seed-3/measures.json: older than the adapter; measure that run again" in text
    assert read_parts(stale)[0] == {}


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where a run would begin, or what several of them share would be made."""
    for name in ("prepare", "run_all"):
        monkeypatch.setattr(quality, name, lambda *arguments, name=name: pytest.fail(f"{name} was called"))


def changed_arms(**changes) -> dict[str, Arm]:
    """The benchmark's arms, one of them with other attributes."""
    arms = make_arms()
    return arms | {name: replace(arms[name], **change) for name, change in changes.items()}


@pytest.mark.parametrize("command", ["train", "measure"])
def test_nothing_begins_where_an_arm_has_changed_since_its_run(command, nothing_runs, tmp_path, monkeypatch):
    for seed in range(2):
        finish(tmp_path, "prior", seed)
    settings = make_arms()["prior"].settings | {"rank": 8, "learning_rate": 5e-4, "lora_layers": ("to_q",)}
    monkeypatch.setattr(quality, "make_arms", lambda: changed_arms(prior={"settings": settings}))
    words = [command, "--folder", str(tmp_path), "--arms", "prior"]
    with pytest.raises(UserError) as refused:
        quality.main(words)
    assert str(refused.value) == (
        f"--folder {tmp_path}: runs/prior/seed-0: rank was 4 and is 8 now, "
        "lora_layers was None and is ['to_q'] now, learning_rate was 0.001 and is 0.0005 now "
        "(and 1 more such); remove that run's folder or name another --folder"
    )
    shutil.rmtree(run_folder(tmp_path, "prior", 0))
    with pytest.raises(UserError, match=r"seed-1: rank was 4 and is 8 now.* 0\.0005 now; remove"):
        quality.main(words)


def test_a_run_of_a_changed_arm_is_left_out_of_the_report(tmp_path):
    arms = changed_arms(ema={"settings": {"use_ema": True, "ema_decay": 0.9}})
    for seed in SEEDS:
        for name in ("mild-lora", "ema"):
            write(tmp_path, name, seed, PLAIN)
            folder = finish(tmp_path, name, seed)
            os.utime(folder / WEIGHTS_NAME, (1, 1))
    text = report(tmp_path, arms)
    assert "## Regularisers" not in text and rows(text, "## Mild")[0]["seeds"] == "5"
    line = "- runs/ema/seed-2: ema_decay was 0.99 and is 0.9 now; remove that folder and train it again"
    assert line in text.splitlines()


def test_finished_runs_count_wherever_their_folder_is_and_whatever_came_since(tmp_path):
    """They are told by their folders' names; a setting that was not there yet had its default."""
    arms = make_arms()
    there = {"pretrained_model_name_or_path": "/elsewhere/assets/micro-sdxl"}
    finish(tmp_path / "first", "few-lora", 0, **there)
    finish(tmp_path / "first", "prior", 0, **there)
    (tmp_path / "first").rename(tmp_path / "second")
    for name in ("few-lora", "prior"):
        assert change_since(tmp_path / "second", name, arms[name], 0) is None
        assert change_since(tmp_path / "second", name, arms[name], 1) is None, "it isn't finished"
    other = replace(arms["few-lora"], few_icons=False)
    found = change_since(tmp_path / "second", "few-lora", other, 0)
    assert found == "runs/few-lora/seed-0: instance_data_dir was few-icons and is icons-3d now"

    file = finish(tmp_path, "ema", 0) / SUMMARY
    told = json.loads(file.read_text())["settings"]
    del told["snr_gamma"], told["use_ema"]
    file.write_text(json.dumps({"settings": told}))
    assert (
        change_since(tmp_path, "ema", arms["ema"], 0) == "runs/ema/seed-0: use_ema was False and is True now"
    )
    for damaged in ("{", "{}", "[]", '{"settings": 1}'):
        file.write_text(damaged)
        assert "summary.json or rival.json is damaged" in change_since(tmp_path, "ema", arms["ema"], 0)


def test_a_rival_and_its_rho_belong_to_the_settings(tmp_path, monkeypatch):
    """In their own file, without which older runs count."""
    monkeypatch.setattr(rivals, "train", lambda config, rival, rho: finish(tmp_path, "sam-0.2", config.seed))
    quality.train_run(tmp_path, ("sam-0.2", 0))
    arm = make_arms()["sam-0.2"]
    assert change_since(tmp_path, "sam-0.2", arm, 0) is None
    other = replace(arm, rival="bi-lora", rho=0.3)
    found = change_since(tmp_path, "sam-0.2", other, 0)
    assert found == "runs/sam-0.2/seed-0: rival was sam and is bi-lora now, rho was 0.2 and is 0.3 now"
    assert "rival was sam and is None now" in change_since(tmp_path, "sam-0.2", replace(arm, rival=None), 0)
    finish(tmp_path, "sam-0.2", 1)
    assert change_since(tmp_path, "sam-0.2", other, 1) is None


def test_figures_show_the_differences_of_the_tables(tmp_path, monkeypatch):
    shown = {"forest": [], "curves": [], "scatter": []}
    for name, calls in shown.items():
        monkeypatch.setattr(quality_figures, name, lambda *data, calls=calls: calls.append(data) or data)
    monkeypatch.setattr(quality_figures, "write_png", lambda figure, path: None)
    arms = make_arms()
    changes = {"mild-flat-0.1": -0.1, "mild-flat-0.3": -0.4, "mild-flat-constant-0.3": 0.2, "sam-0.2": 0.1}
    for seed, jitter in zip(SEEDS, JITTER, strict=True):
        write(tmp_path, "mild-lora", seed, PLAIN | scaled() | {"rise_0.1": 0.1})
        for name, change in changes.items():
            changed = {"rise_0.1": 0.1 * (1 + change), "heldout_loss": heldout(1) * (1 + change + jitter)}
            curve = scaled() if name == "mild-flat-0.3" else {}
            write(tmp_path, name, seed, PLAIN | curve | changed)
    paths = quality_figures.write_figures(read_runs(tmp_path, arms)[0], arms, tmp_path)
    scattered = list(quality_figures.SCATTERED)
    assert [path.stem for path in paths] == [*quality_figures.FORESTS, "sigma", *scattered, "scales"]
    rows_shown = {row.label: row for row in shown["forest"][0][0]}
    assert rows_shown["Flat-LoRA 0.3"].mean == pytest.approx(-40)
    assert rows_shown["Flat-LoRA 0.3"].n == 5 and rows_shown["Flat-LoRA 0.3"].group == "mild"
    by_schedule = {series.label: series for series in shown["curves"][0][0]}
    assert by_schedule["cosine"].sigmas == [0.1, 0.3]
    assert [values[0] for values in by_schedule["cosine"].values] == pytest.approx([-10, -40])
    assert [values[0] for values in by_schedule["constant"].values] == pytest.approx([20])
    style, flatness, over_scales = shown["scatter"]
    points = {(point.group, point.label): point for point in style[0]}
    by_sigma, by_scale = "Flat-LoRA, by sigma", "LoRA, by inference scale"
    kept = PLAIN["retention_loss"]
    expected = {
        **{(by_scale, f"x {s:g}"): (heldout(s), retention(s)) for s in (0.2, 0.4, 0.6, 0.8, 1.2)},
        (by_scale, "LoRA"): (heldout(1), retention(1)),
        (by_sigma, "0.1"): (heldout(1) * 0.9, kept),
        (by_sigma, "0.3"): (heldout(1) * 0.6, retention(1)),
        ("rivals", "SAM on merged weights, rho 0.2"): (heldout(1) * 1.1, kept),
    }
    assert points.keys() == expected.keys()
    for key, (x, y) in expected.items():
        assert (points[key].x[0], points[key].y[0]) == pytest.approx((x, y))
    assert {by_sigma, by_scale} <= set(style[3]) and "rivals" not in style[3]
    assert {point.label for point in flatness[0]} == {"LoRA", "0.1", "0.3", "SAM on merged weights, rho 0.2"}
    over = [(point.group, point.label) for point in over_scales[0]]
    scales = ("x 0.2", "x 0.4", "x 0.6", "x 0.8", "x 1", "x 1.2")
    assert over == [(arm, scale) for arm in ("LoRA", "Flat-LoRA 0.3") for scale in scales]
