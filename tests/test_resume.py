"""Killed at any instant and resumed, a run ends in the same file as one never interrupted."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "train_dreambooth_flat.py"
WEIGHTS = "pytorch_lora_weights.safetensors"


def command(base_path, icons, output, *extra) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": base_path,
        "instance_data_dir": icons,
        "instance_prompt": "a icon",
        "output_dir": output,
        "resolution": 16,
        "train_batch_size": 1,
        "max_train_steps": 120,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "flat_sigma": 0.5,
        "learning_rate": 1e-3,
        "report_to": "none",
        "seed": 5,
    }
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, str(SCRIPT), *flags, *map(str, extra)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(words: list[str], log: Path) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=log.open("a"), stderr=subprocess.STDOUT, start_new_session=True)


def wait_until_it_trains(process: subprocess.Popen, output: Path, since: float) -> None:
    """Until the process has begun to write a checkpoint, or is over."""
    while process.poll() is None:
        if output.is_dir() and any(p.stat().st_mtime >= since for p in output.iterdir() if p.is_dir()):
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(base_path, tmp_path_factory):
    """The icons, and the hash of the adapter that an undisturbed run ends in."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("undisturbed")
    icons = folder / "icons"
    icons.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        icon = Image.new("RGBA", (20, 16 + 4 * index), (0, 0, 0, 0))
        ImageDraw.Draw(icon).rectangle((2, 3, 12, 13), fill=colour)
        icon.save(icons / f"{colour}.png")
    output = folder / "out"
    subprocess.run(command(base_path, icons, output, "--random_flip"), check=True, capture_output=True)
    return icons, digest(output / WEIGHTS)


def test_ten_kills_and_resumes_end_in_the_same_file(base_path, undisturbed, tmp_path):
    icons, expected = undisturbed
    output, log = tmp_path / "out", tmp_path / "log"
    words = command(base_path, icons, output, "--random_flip", "--resume_from_checkpoint", "latest")
    delays = random.Random(0)
    kills = 0
    for _ in range(10):
        since = time.time()
        process = start(words, log)
        wait_until_it_trains(process, output, since)
        time.sleep(delays.uniform(0, 0.12))
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills == 10, "the run was over before it could be killed ten times"
    subprocess.run(words, check=True, capture_output=True)
    assert digest(output / WEIGHTS) == expected
    assert "resuming from" in log.read_text()
    assert not list(output.glob(".*")), "an unfinished file was left behind"
    assert len(list(output.glob("checkpoint-*"))) == 3
    # A finished run isn't trained on.
    again = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "is complete already" in again.stderr
    assert digest(output / WEIGHTS) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(base_path, undisturbed, tmp_path, number, code):
    icons, expected = undisturbed
    output, log = tmp_path / "out", tmp_path / "log"
    words = command(base_path, icons, output, "--random_flip")
    process = start(words, log)
    wait_until_it_trains(process, output, 0)
    process.send_signal(number)
    assert process.wait() == code
    told = log.read_text()
    assert "stopped after step" in told and "--resume_from_checkpoint latest" in told
    assert "Traceback" not in told
    step = int(told.split("stopped after step ")[1].split()[0])
    state = json.loads((output / f"checkpoint-{step}" / "state.json").read_text())
    assert state["step"] == step and len(state["scalars"]["losses"]) == step
    assert not (output / WEIGHTS).exists()
    subprocess.run([*words, "--resume_from_checkpoint", "latest"], check=True, capture_output=True)
    assert digest(output / WEIGHTS) == expected


def test_a_comparison_goes_on_with_the_arm_that_was_interrupted(base_path, undisturbed, tmp_path):
    icons, expected = undisturbed
    output, log = tmp_path / "out", tmp_path / "log"
    drawing = ("--validation_inference_steps", 2, "--num_validation_images", 1)
    words = command(base_path, icons, output, "--random_flip", "--compare", *drawing)
    process = start(words, log)
    while process.poll() is None and not list(output.glob("flat_lora/checkpoint-*")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    plain = digest(output / "lora" / WEIGHTS)
    resumed = subprocess.run(
        [*words, "--resume_from_checkpoint", "latest"], check=True, capture_output=True, text=True
    )
    assert "lora is complete already" in resumed.stderr and "resuming from" in resumed.stderr
    assert digest(output / "lora" / WEIGHTS) == plain
    assert digest(output / "flat_lora" / WEIGHTS) == expected
    assert (output / "comparison.png").is_file()
