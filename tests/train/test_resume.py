"""Killed at any instant and resumed, a run ends in the same file as one never interrupted."""

import fcntl
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import LOCK_NAME
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback, TrainingRun
from tests.script import SCRIPT

LATEST = ("--resume_from_checkpoint", "latest")
UNFINISHED = ".unfinished-checkpoint-*"
KILLS = ["while loading"] * 4 + ["between two checkpoints"] * 8 + ["while a checkpoint is written"] * 8


def flags(base_path, icons, output, *extra) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": base_path,
        "instance_data_dir": icons,
        "instance_prompt": "a icon",
        "output_dir": output,
        "resolution": 16,
        "train_batch_size": 1,
        "max_train_steps": 12,
        "checkpointing_steps": 2,
        "flat_sigma": 0.5,
        "learning_rate": 1e-3,
        "report_to": "none",
        "seed": 5,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [*words, "--random_flip", *map(str, extra)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps(output: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


def slow_disk(seconds: float = 0.01) -> None:
    """Let a process take its time for every file that it writes."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(seconds)
        original(descriptor)

    os.fsync = fsync


def slow_lock() -> None:
    """Let a process take its time between making a lock's file and holding the lock."""
    original = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        time.sleep(0.3)
        original(descriptor, operation)

    fcntl.flock = flock


@pytest.fixture(scope="module")
def three_icons(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "icons"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        icon = Image.new("RGBA", (20, 16 + 4 * index), (0, 0, 0, 0))
        ImageDraw.Draw(icon).rectangle((2, 3, 12, 13), fill=colour)
        icon.save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(base_path, three_icons, tmp_path_factory, launcher) -> str:
    """Hash of the adapter that an undisturbed run ends in."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert launcher.run(*flags(base_path, three_icons, output)).code == 0
    return digest(output / WEIGHTS_NAME)


class Killed(BaseException):
    """Ends a run in this process where a kill would."""


class Killer(Callback):
    """Ends a run at some moment, after it has kept the files as a kill at that moment leaves them.

    What the run does to its folder on the way out `restore` undoes: a kill needs no process of its own.
    """

    def __init__(self, output: Path, moment: str, draw: random.Random, patch: pytest.MonkeyPatch) -> None:
        self.output, self.moment = output, moment
        self.kept = output.with_name("kept")
        self._seconds = draw.uniform(0, 0.15 if moment == "while loading" else 0.04)
        self._syncs = draw.randrange(10)
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._sync)
        # Time of the processor: on a busy machine it is the same moment.
        self._previous = signal.signal(signal.SIGPROF, self._kill)
        if moment == "while loading":
            signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def on_checkpoint(self, run: TrainingRun) -> None:
        if self.moment == "between two checkpoints" and signal.getitimer(signal.ITIMER_PROF)[0] == 0:
            signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def _sync(self, descriptor: int) -> None:
        if self.moment == "while a checkpoint is written" and list(self.output.glob(UNFINISHED)):
            self._syncs -= 1
            if self._syncs < 0:
                self._kill()
        self._fsync(descriptor)

    def _kill(self, *_: object) -> None:
        if not self.kept.exists():
            shutil.copytree(self.output, self.kept) if self.output.exists() else self.kept.mkdir()
            raise Killed

    def restore(self) -> None:
        signal.signal(signal.SIGPROF, self._previous)
        shutil.rmtree(self.output, ignore_errors=True)
        self.kept.rename(self.output)


def killed_here(words: list[str], output: Path, moment: str, draw: random.Random) -> None:
    """Let a run in this process be killed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(output, moment, draw, patch)
        try:
            train(parse_train_config(words), callbacks=[killer])
        except Killed:
            pass
        except UserError:  # a library that was killed while it loaded a file takes the file for broken
            assert killer.kept.exists()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        assert killer.kept.exists(), "the run was over before it could be killed 20 times"
        killer.restore()


def killed_there(words: list[str], output: Path, moment: str, launcher) -> None:
    """Kill a process."""
    before = steps(output)
    running = launcher.start(*words, prepare=slow_disk)
    if moment == "between two checkpoints":
        assert running.wait_until(lambda: steps(output)[-1:] > before[-1:])
    else:
        assert running.wait_until(lambda: list(output.glob(UNFINISHED)))
    running.kill()
    assert running.code == -signal.SIGKILL, "the run was over before it could be killed 20 times"


def test_twenty_kills_and_resumes_end_in_the_same_file(base_path, three_icons, tmp_path, launcher):
    """Two of them kill a process; the others leave the same files behind without one."""
    twin, output = tmp_path / "twin", tmp_path / "out"
    longer = ("--max_train_steps", 64, "--checkpoints_total_limit", 3)
    assert launcher.run(*flags(base_path, three_icons, twin, *longer)).code == 0
    words = flags(base_path, three_icons, output, *longer, *LATEST)
    draw = random.Random(0)
    met = []
    processes = {"between two checkpoints", "while a checkpoint is written"}  # of each kind the first one
    for moment in draw.sample(KILLS, len(KILLS)):
        before = steps(output)
        if moment in processes:
            processes.remove(moment)
            killed_there(words, output, moment, launcher)
        else:
            killed_here(words, output, moment, draw)
        met.append("writing" if list(output.glob(UNFINISHED)) else steps(output) != before)
    assert met.count("writing") >= 5 and met.count(True) >= 5 and met.count(False) >= 2, met
    last = launcher.run(*words)
    assert last.code == 0, last.stderr
    assert "resuming from" in last.stderr
    assert digest(output / WEIGHTS_NAME) == digest(twin / WEIGHTS_NAME)
    assert not list(output.glob(".*")), "an unfinished file was left behind"
    assert steps(output) == steps(twin) == [60, 62, 64]
    again = launcher.run(*words)
    assert again.code == 0 and "is complete already" in again.stderr
    assert digest(output / WEIGHTS_NAME) == digest(twin / WEIGHTS_NAME)


@pytest.fixture(params=[(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def stop(request) -> tuple[signal.Signals, int]:
    """A signal, and the exit code that belongs to it."""
    return request.param


def assert_it_goes_on(told: str, launcher) -> None:
    """The command that an interrupted run prints."""
    script, *words = shlex.split(told.strip().splitlines()[-1])[1:]
    assert Path(script).name == SCRIPT and words[-2:] == list(LATEST)
    resumed = launcher.run(*words)
    assert resumed.code == 0, resumed.stderr


def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    base_path, three_icons, undisturbed, tmp_path, launcher, stop
):
    number, code = stop
    output = tmp_path / "out"
    running = launcher.start(*flags(base_path, three_icons, output))
    assert running.wait_until(lambda: steps(output))
    os.kill(running.pid, number)
    assert running.wait() == code
    assert "stopped after step" in running.stderr and "Traceback" not in running.stderr
    step = int(running.stderr.split("stopped after step ")[1].split()[0])
    state = json.loads((output / f"checkpoint-{step}" / "state.json").read_text())
    assert state["step"] == step and len(state["scalars"]["losses"]) == step
    assert not (output / WEIGHTS_NAME).exists()
    assert_it_goes_on(running.stderr, launcher)
    assert digest(output / WEIGHTS_NAME) == undisturbed


def test_ctrl_c_in_a_terminal(base_path, three_icons, undisturbed, tmp_path, launcher):
    """The terminal sends the signal to all processes of the group."""
    output = tmp_path / "out"
    running = launcher.start(*flags(base_path, three_icons, output), prepare=os.setsid)
    assert running.wait_until(lambda: steps(output))
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait() == 130 and "Traceback" not in running.stderr, running.stderr
    assert_it_goes_on(running.stderr, launcher)
    assert digest(output / WEIGHTS_NAME) == undisturbed


@pytest.mark.parametrize("prepare", [None, slow_lock], ids=["while loading", "while locking"])
def test_a_signal_before_training_leaves_nothing(base_path, three_icons, tmp_path, launcher, stop, prepare):
    number, code = stop
    output = tmp_path / "out"
    running = launcher.start(*flags(base_path, three_icons, output), prepare=prepare)
    assert running.wait_until(lambda: (output / LOCK_NAME).exists())
    os.kill(running.pid, number)
    assert running.wait() == code
    assert running.stderr.splitlines()[-1] == "interrupted; what was saved before is still there"
    assert "Traceback" not in running.stderr
    assert not output.exists()


def test_a_signal_while_the_adapter_is_saved_waits_for_it(
    base_path, three_icons, undisturbed, tmp_path, launcher, stop
):
    number, code = stop
    output = tmp_path / "out"
    running = launcher.start(*flags(base_path, three_icons, output), prepare=slow_disk)
    assert running.wait_until(lambda: (output / f".{WEIGHTS_NAME}.tmp").exists())
    os.kill(running.pid, number)
    assert running.wait() == code
    assert f"saved {output / WEIGHTS_NAME}; go on with" in running.stderr
    assert digest(output / WEIGHTS_NAME) == undisturbed
    assert (output / "summary.json").exists()
    assert_it_goes_on(running.stderr, launcher)


def test_a_comparison_goes_on_with_the_arm_that_was_interrupted(
    base_path, three_icons, undisturbed, tmp_path, launcher
):
    output = tmp_path / "out"
    drawing = ("--validation_inference_steps", 2, "--num_validation_images", 1)
    words = flags(base_path, three_icons, output, "--compare", *drawing)
    running = launcher.start(*words)
    assert running.wait_until(lambda: list(output.glob("flat_lora/checkpoint-*")))
    running.kill()
    plain = digest(output / "lora" / WEIGHTS_NAME)
    resumed = launcher.run(*words, *LATEST)
    assert resumed.code == 0, resumed.stderr
    assert "lora is complete already" in resumed.stderr and "resuming from" in resumed.stderr
    assert digest(output / "lora" / WEIGHTS_NAME) == plain
    assert digest(output / "flat_lora" / WEIGHTS_NAME) == undisturbed
    assert (output / "comparison.png").is_file()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
def test_a_disk_that_takes_no_more_in_a_checkpoint(base_path, three_icons, undisturbed, tmp_path, launcher):
    """The system itself refuses to write on, without a mock: here with a limit to the size of files."""
    output = tmp_path / "out"
    words = flags(base_path, three_icons, output)
    running = launcher.start(*words, prepare=slow_disk)
    assert running.wait_until(lambda: 4 in steps(output))
    room = (output / "checkpoint-2" / "optimizer.safetensors").stat().st_size // 2
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (room, room))
    assert running.wait() == 2
    kept = steps(output)
    errors = [line for line in running.stderr.splitlines() if line.startswith("error: ")]
    assert running.stderr.splitlines()[-1:] == errors and "Traceback" not in running.stderr
    assert f"checkpoint-{kept[-1] + 2}: the checkpoint cannot be written (File too large)" in errors[0]
    assert kept[:2] == [2, 4] and not list(output.glob(".*"))
    resumed = launcher.run(*words, *LATEST)
    assert resumed.code == 0, resumed.stderr
    assert f"resuming from {output / f'checkpoint-{kept[-1]}'}" in resumed.stderr
    assert digest(output / WEIGHTS_NAME) == undisturbed
