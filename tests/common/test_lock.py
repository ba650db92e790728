"""Two runs into one output folder are refused; what a killed one left locks nothing."""

import errno
import fcntl
import functools
import os
import socket
import time

import pytest

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import LOCK_NAME, output_lock
from tests.train.test_resume import LATEST, UNFINISHED, digest, flags


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def refusal(running):
    """The one line of a run that was refused."""
    assert running.code == 2
    lines = [line for line in running.stderr.splitlines() if line.startswith("error: ")]
    assert running.stderr.splitlines()[-1:] == lines and "Traceback" not in running.stderr
    return lines[0]


@pytest.fixture
def undisturbed(base_path, icons, tmp_path, launcher):
    """Hash of the adapter that an undisturbed run ends in."""
    output = tmp_path / "undisturbed"
    assert launcher.run(*flags(base_path, icons, output)).code == 0
    return digest(output / WEIGHTS_NAME)


def pause(folder):
    """Let a process stop when it writes its first file, until there is `go` in the folder."""
    original = os.fsync

    def fsync(descriptor):
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        original(descriptor)

    os.fsync = fsync


@pytest.fixture
def held(base_path, icons, tmp_path, launcher):
    """Starts a run that stops while it writes its first checkpoint."""

    def start(*others):
        words = flags(base_path, icons, tmp_path / "out", *others)
        running = launcher.start(*words, prepare=functools.partial(pause, tmp_path))
        assert running.wait_until((tmp_path / "waiting").exists)
        return running

    return start


def test_a_second_run_is_refused_and_touches_nothing(base_path, icons, tmp_path, launcher, held, undisturbed):
    output, first = tmp_path / "out", held()
    before = contents(output)
    assert list(output.glob(UNFINISHED)), "what the first run is writing"
    for others in ((), LATEST, ("--output_dir", f"{output}/../out/."), ("--rank", 2)):
        error = refusal(launcher.run(*flags(base_path, icons, output, *others)))
        assert f"out: another run (process {first.pid} on {socket.gethostname()}) writes to it" in error
        assert contents(output) == before
    (tmp_path / "go").touch()
    assert first.wait() == 0
    assert digest(output / WEIGHTS_NAME) == undisturbed
    assert not list(output.glob(".*"))


def test_a_killed_run_leaves_no_lock(base_path, icons, tmp_path, launcher, held, undisturbed):
    output = tmp_path / "out"
    held().kill()
    assert (output / LOCK_NAME).is_file(), "the file stays, the lock doesn't"
    resumed = launcher.run(*flags(base_path, icons, output), *LATEST)
    assert resumed.code == 0, resumed.stderr
    assert digest(output / WEIGHTS_NAME) == undisturbed
    assert not list(output.glob(".*"))


def test_a_comparison_holds_its_folder_and_those_of_both_arms(base_path, icons, tmp_path, launcher, held):
    output, comparison = tmp_path / "out", held("--compare")
    before = contents(output)
    for folder, others in ((output, ["--compare"]), (output / "lora", []), (output / "flat_lora", [])):
        error = refusal(launcher.run(*flags(base_path, icons, folder, *others)))
        assert f"--output_dir {folder}: another run (process {comparison.pid} on " in error
    assert contents(output) == before
    comparison.kill()


# The lock by itself.


@pytest.mark.parametrize("deep", [False, True])
def test_what_was_made_for_the_lock_goes_with_it_unless_something_is_in_it(tmp_path, deep):
    folder = tmp_path / "a" / "b" / "out" if deep else tmp_path / "out"
    with output_lock(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []
    with output_lock(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with output_lock(folder), pytest.raises(UserError, match="another run"), output_lock(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_the_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), output_lock(tmp_path):
        raise KeyError
    with output_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_for_lack_of_writing(tmp_path):
    (tmp_path / "file").touch()
    message = r"--output_dir .*file/out: cannot be written to \(Not a directory\)"
    with pytest.raises(UserError, match=message), output_lock(tmp_path / "file" / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_file_that_its_last_holder_removes_in_between_is_made_anew(tmp_path, monkeypatch):
    """Else two runs could hold one folder: one the file that is gone, one the new file."""
    original, removed = fcntl.flock, []

    def flock(descriptor, operation):
        if not removed:
            removed.append(True)
            (tmp_path / LOCK_NAME).unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_lock(tmp_path):
        assert removed and (tmp_path / LOCK_NAME).is_file()
        with pytest.raises(UserError, match="another run"), output_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # nothing that stays could refuse the next run
        with output_lock(tmp_path):
            pass
    assert caplog.text.count(f"{LOCK_NAME} cannot be locked ({os.strerror(number)}): take care") == 2
    assert list(tmp_path.iterdir()) == []
