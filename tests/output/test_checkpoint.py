"""Checkpoints and adapter files: whole or not there, verified, and the same bits when they come back."""

import collections
import copy
import errno
import io
import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_processor import Attention
from prodigyopt import Prodigy
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from flatlora_diffusion.adapter.file import (
    FLAT_METADATA_KEY,
    WEIGHTS_NAME,
    adapter_bytes,
    adapter_tensors,
    load_adapter_tensors,
    read_facts,
)
from flatlora_diffusion.adapter.formats import read_tensors
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output import record
from flatlora_diffusion.output.checkpoint import (
    OPTIMIZER_NAME,
    STATE_NAME,
    Checkpoint,
    find_checkpoint,
    flatten_optimizer,
    optimizer_numbers,
    restore_optimizer,
    write_checkpoint,
)
from flatlora_diffusion.sdxl.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, add_lora
from tests.tiny import build_pipeline, global_rng_state, unet_inputs

SETTINGS = {"rank": 4, "seed": 0, "learning_rate": 1e-4, "validation_prompt": ("a", "b")}
FILES = (WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME)


def make_checkpoint(step, size=8, **settings):
    values = torch.arange(size, dtype=torch.float32) + step
    return Checkpoint(
        step=step,
        adapter=save({"unet.lora": values}),
        optimizer={"0.exp_avg": values.sqrt(), "0.step": torch.tensor(float(step))},
        settings=SETTINGS | settings,
        scalars={"losses": [0.1 * index for index in range(step)], "lr_scheduler": {"last_epoch": step}},
    )


def write(output, *steps, limit=None):
    output.mkdir(exist_ok=True)
    for step in steps:
        write_checkpoint(output, make_checkpoint(step), limit)


def find(output, wanted="latest", **settings):
    return find_checkpoint(output, wanted, SETTINGS | settings)


def assert_sound(stored, step):
    expected = make_checkpoint(step)
    assert stored is not None, "no checkpoint was found"
    assert (stored.step, stored.folder.name) == (step, f"checkpoint-{step}")
    assert stored.scalars == expected.scalars
    assert stored.settings == SETTINGS | {"validation_prompt": ["a", "b"]}
    assert_same_tensors(stored.tensors(WEIGHTS_NAME), load(expected.adapter))
    assert_same_tensors(stored.tensors(OPTIMIZER_NAME), expected.optimizer)


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Writing, finding, rotating.


def test_what_was_written_is_found(tmp_path):
    output = tmp_path / "out"
    write(output, 5)
    assert names(output) == ["checkpoint-5"]
    assert names(output / "checkpoint-5") == sorted(FILES)
    assert_sound(find(output), 5)
    assert (output / "checkpoint-5" / WEIGHTS_NAME).read_bytes() == make_checkpoint(5).adapter


def test_the_newest_is_found_by_number(tmp_path):
    output = tmp_path / "out"
    write(output, 9, 100, 10)
    assert_sound(find(output), 100)


def test_nothing_to_find(tmp_path):
    assert find(tmp_path / "none") is None
    assert not (tmp_path / "none").exists(), "looking leaves nothing behind"
    assert find(tmp_path) is None


def test_entries_that_only_look_like_checkpoints(tmp_path):
    output = tmp_path / "out"
    write(output, 2)
    for name in ("checkpoint-old", "checkpoint-3.bak", "my-checkpoint-9", "checkpoint-"):
        (output / name).mkdir()
    (output / "checkpoint-7").write_text("a file")
    before = names(output)
    assert_sound(find(output), 2)
    assert names(output) == before


@pytest.mark.parametrize(
    "wanted", ["checkpoint-2", "checkpoint-2/", "out/checkpoint-2", "ROOT/out/checkpoint-2"]
)
def test_a_named_checkpoint(tmp_path, monkeypatch, wanted):
    output = tmp_path / "out"
    write(output, 1, 2, 3)
    monkeypatch.chdir(tmp_path)
    assert_sound(find(output, wanted.replace("ROOT", str(tmp_path))), 2)


def test_a_path_is_not_taken_for_the_checkpoint_of_that_name_in_the_output_folder(tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(output, 1, 2)
    with pytest.raises(UserError, match=f"checkpoint-2: not in {elsewhere} .there: none"):
        find(output, str(elsewhere / "checkpoint-2"))
    write(elsewhere, 1, 2)
    stored = find(output, str(elsewhere / "checkpoint-2"))
    assert_sound(stored, 2)
    assert stored.folder == elsewhere / "checkpoint-2"


def test_a_renamed_checkpoint_is_known_by_its_content(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(output, 1, 2)
    (output / "checkpoint-1").rename(output / "best")
    monkeypatch.chdir(tmp_path)
    for wanted in ("best", "out/best", str(output / "best")):
        stored = find(output, wanted)
        assert (stored.step, stored.folder.name) == (1, "best")
    assert_sound(find(output), 2)
    with pytest.raises(UserError, match="belongs to other settings"):
        find(output, "best", rank=9)
    (output / "best" / OPTIMIZER_NAME).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"best: the checkpoint is damaged \(optimizer.safetensors has changed"
    ):
        find(output, "best")


@pytest.mark.parametrize("wanted", ["checkpoint-7", "checkpoint-", "newest", "2", "checkpoint-12"])
def test_a_named_checkpoint_that_is_not_there(tmp_path, wanted):
    output = tmp_path / "out"
    write(output, 1, 2, 10)
    with pytest.raises(UserError) as error:
        find(output, wanted)
    message = str(error.value)
    assert f"--resume_from_checkpoint {wanted}" in message
    assert "there: checkpoint-1, checkpoint-2, checkpoint-10" in message


def test_a_named_checkpoint_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="there: none"):
        find(tmp_path, "checkpoint-1")


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    output = tmp_path / "out"
    write(output, 2, 4, 6, 8, limit=None)
    assert len(names(output)) == 4
    write(output, 10, limit=2)
    assert names(output) == ["checkpoint-10", "checkpoint-8"], "oldest by number, not by spelling"
    write(output, 12, limit=1)
    assert names(output) == ["checkpoint-12"]


def test_an_old_one_that_cannot_be_removed_is_named_and_training_goes_on(tmp_path, monkeypatch, caplog):
    output = tmp_path / "out"
    write(output, 1)

    def rmtree(path, ignore_errors=False):  # as on a network disk where someone has a file of it open
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        write(output, 2, limit=1)
    assert f"{output / 'checkpoint-1'} cannot be removed (Directory not empty)" in caplog.text
    assert_sound(find(output), 2)
    assert names(output) == ["checkpoint-2"]


def test_the_one_just_written_stays_whatever_an_earlier_run_left(tmp_path):
    output = tmp_path / "out"
    write(output, 500)
    write(output, 100, limit=1)
    assert "checkpoint-100" in names(output)


def test_writing_leaves_the_global_rng_alone(tmp_path):
    before = global_rng_state()
    write(tmp_path / "out", 1, 2, limit=1)
    find(tmp_path / "out")
    assert global_rng_state() == before


# Damage.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, index=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if index is None else index] ^= 1
    path.write_bytes(content)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "garbage": lambda path: path.write_bytes(b"\xff\xfe\x00garbage"),
    "a folder": become_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, file, damage):
    output = tmp_path / "out"
    write(output, 1, 2, 3)
    damage(output / "checkpoint-3" / file)
    assert_sound(find(output), 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(output / "checkpoint-3") in caplog.text
    assert file in caplog.text


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_noticed(tmp_path, file):
    output = tmp_path / "out"
    write(output, 1, 2)
    path = output / "checkpoint-2" / file
    sound = path.read_bytes()
    for index in range(0, len(sound), max(1, len(sound) // 60)):
        flip(path, index)
        assert_sound(find(output), 1)
        path.write_bytes(sound)
    assert_sound(find(output), 2)


@pytest.mark.parametrize("state", [None, [], {}, "text", 3, {"sha256": None}, {"sha256": []}, {"step": 2}])
def test_a_state_that_is_not_what_was_written(tmp_path, state):
    output = tmp_path / "out"
    write(output, 1, 2)
    (output / "checkpoint-2" / STATE_NAME).write_text(json.dumps(state))
    assert_sound(find(output), 1)


def test_an_empty_checkpoint_folder(tmp_path, caplog):
    output = tmp_path / "out"
    write(output, 1)
    (output / "checkpoint-2").mkdir()
    assert_sound(find(output), 1)
    assert "checkpoint-2 is damaged" in caplog.text


def test_when_a_named_one_is_damaged_an_earlier_one_is_taken_never_a_later(tmp_path, caplog):
    output = tmp_path / "out"
    write(output, 1, 2, 3)
    cut(output / "checkpoint-2" / OPTIMIZER_NAME)
    assert_sound(find(output, "checkpoint-2"), 1)
    assert str(output / "checkpoint-2") in caplog.text


def test_all_damaged(tmp_path, caplog):
    output = tmp_path / "out"
    write(output, 1, 2)
    for step in (1, 2):
        flip(output / f"checkpoint-{step}" / WEIGHTS_NAME)
    with pytest.raises(UserError, match="no checkpoint is sound") as error:
        find(output)
    assert str(output) in str(error.value)
    assert caplog.text.count("is damaged") == 2


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    output = tmp_path / "out"
    write(output, 1, 2)
    cut(output / "checkpoint-2" / WEIGHTS_NAME)
    write(output, 2)
    assert_sound(find(output), 2)
    assert names(output) == ["checkpoint-1", "checkpoint-2"]


def test_an_unfinished_one_is_cleaned_away(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    for name in (".unfinished-checkpoint-2", ".unfinished-removed-checkpoint-0"):
        (output / name).mkdir()
        (output / name / WEIGHTS_NAME).write_bytes(b"half")
    (output / ".mine").mkdir()
    assert_sound(find(output), 1)
    assert names(output) == [".mine", "checkpoint-1"]


def test_writing_goes_on_over_an_unfinished_one(tmp_path):
    output = tmp_path / "out"
    (output / ".unfinished-checkpoint-2").mkdir(parents=True)
    (output / ".unfinished-checkpoint-2" / "stray").write_bytes(b"half")
    write(output, 2)
    assert names(output) == ["checkpoint-2"]
    assert names(output / "checkpoint-2") == sorted(FILES)


# Settings.


def test_other_settings_are_named_with_both_values(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    with pytest.raises(UserError) as error:
        find(output, rank=8)
    message = str(error.value)
    assert str(output / "checkpoint-1") in message
    assert "(rank 4 then and 8 now)" in message
    assert "--output_dir" in message


def test_settings_that_only_one_side_has(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    with pytest.raises(UserError, match="revision None then and 1 now"):
        find(output, revision=1)
    with pytest.raises(UserError, match="rank 4 then and None now"):
        find_checkpoint(output, "latest", {name: v for name, v in SETTINGS.items() if name != "rank"})


def test_many_other_settings_are_cut_short(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    many = {"rank": 8, "lora_alpha": 1, "optimizer": "prodigy", "use_dora": True, "learning_rate": 1e-5}
    with pytest.raises(UserError, match=r"\(lora_alpha .* 1 now, optimizer .*, rank .*, \.\.\.\)") as error:
        find(output, **many)
    assert "use_dora" not in str(error.value) and "learning_rate" not in str(error.value)


def test_what_a_run_may_go_on_with_is_told(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    assert find(output).differences == {}
    found = find(output, learning_rate=1e-5, seed=1, max_train_steps=9)
    assert found.differences == {
        "learning_rate": (1e-4, 1e-5),
        "max_train_steps": (None, 9),
        "seed": (0, 1),
    }


@pytest.mark.parametrize("sigmas", [(0.0, 0.1), (0.1, 0.0)])
def test_noise_neither_begins_nor_ends_on_the_way(tmp_path, sigmas):
    output = tmp_path / "out"
    output.mkdir()
    write_checkpoint(output, make_checkpoint(1, flat_sigma=sigmas[0]), None)
    with pytest.raises(UserError, match=rf"flat_sigma {sigmas[0]} then and {sigmas[1]} now"):
        find(output, flat_sigma=sigmas[1])
    assert find(output, flat_sigma=sigmas[0] * 2).step == 1


def test_other_settings_are_an_error_though_an_older_checkpoint_has_them(tmp_path):
    output = tmp_path / "out"
    write(output, 1)
    write_checkpoint(output, make_checkpoint(2, rank=8), None)
    with pytest.raises(UserError, match="rank 8 then and 4 now"):
        find(output)


# A full disk.


def mounted(folder, options):
    """Mount a small file system in memory, or say why not."""
    folder.mkdir()
    if not sys.platform.startswith("linux") or not shutil.which("mount"):
        return "there is no mount here"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stderr.strip()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    problem = mounted(folder, "size=256k")
    if problem:
        pytest.skip(f"cannot mount: {problem}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fail_at(monkeypatch, count, number=errno.ENOSPC):
    """Let the `count`-th fsync fail."""
    original, calls = os.fsync, [0]

    def fsync(descriptor):
        calls[0] += 1
        if calls[0] == count:
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk):
    with pytest.raises(UserError) as error:
        for step in range(1, 10):
            write_checkpoint(small_disk, make_checkpoint(step, size=10_000), None)
    failed = step
    assert failed > 2, "some must fit"
    message = str(error.value)
    assert message.startswith(
        f"{small_disk / f'checkpoint-{failed}'}: the checkpoint cannot be written (No space"
    )
    assert "--resume_from_checkpoint latest" in message
    assert names(small_disk) == [f"checkpoint-{step}" for step in range(1, failed)]
    for step in range(1, failed):
        stored = find(small_disk, f"checkpoint-{step}")
        assert (stored.step, len(stored.tensors(WEIGHTS_NAME)["unet.lora"])) == (step, 10_000)
    shutil.rmtree(small_disk / "checkpoint-1")
    write_checkpoint(small_disk, make_checkpoint(failed, size=10_000), None)
    assert find(small_disk).step == failed, "it goes on once there is room"


def test_the_system_writes_no_further_at_any_size(tmp_path):
    """No mock: the half of a file that fits is there, and then comes the error."""
    write(tmp_path, 1)
    sizes = sorted((tmp_path / "checkpoint-1" / name).stat().st_size for name in FILES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, *(size // 2 for size in sizes), *(size - 1 for size in sizes)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(UserError, match=r"checkpoint-2: the checkpoint cannot be written \(File too"):
                write(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["checkpoint-1"], "no half of it is left"
        assert_sound(find(tmp_path), 1)
    write(tmp_path, 2)
    assert_sound(find(tmp_path), 2)


def test_a_full_disk_keeps_the_old_file(small_disk):
    path = small_disk / "file"
    write_atomically(path, b"old" * 10_000)
    with pytest.raises(UserError, match="No space left") as error:
        write_atomically(path, b"new" * 100_000)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"old" * 10_000
    assert names(small_disk) == ["file"]


# A kill at any moment. The process dies for good: nothing of it runs afterwards, no `finally`, no `except`.

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def dies_at(count, work, power_cut):
    """Run `work` in a process that dies at its `count`-th change of a file; False if it gets to the end.

    With `power_cut`, of a file that wasn't synced yet only the first half is on the disk.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), "the work itself failed"
        return status == 9
    done = [0]

    def change(descriptor=None):
        done[0] += 1
        if done[0] == count:
            if power_cut and descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os._exit(9)

    original = os.fsync
    os.fsync = lambda descriptor: (change(descriptor), original(descriptor))
    sys.addaudithook(lambda event, arguments: change() if event in CHANGES else None)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def every_death(work, folder, prepare, power_cut):
    """For every change of a file: prepare a folder, die there while working in it, and hand it over."""
    count = 0
    while True:
        count += 1
        output = folder / f"run-{count}"
        prepare(output)
        died = dies_at(count, lambda output=output: work(output), power_cut)
        yield output, died
        if not died:
            assert count > 4, "there must have been something to interrupt"
            return


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
ignore_fork_warning = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
with_power_cut = pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])


def damage_two(output):
    write(output, 1, 2)
    cut(output / "checkpoint-2" / WEIGHTS_NAME)


for_every_start = pytest.mark.parametrize(
    ("prepare", "limit", "possible"),
    [
        pytest.param(lambda output: output.mkdir(), None, {None, 2}, id="the first"),
        pytest.param(lambda output: write(output, 1), None, {1, 2}, id="the second"),
        pytest.param(lambda output: write(output, 0, 1), 1, {1, 2}, id="the oldest removed"),
        pytest.param(damage_two, None, {1, 2}, id="a damaged one replaced"),
        pytest.param(lambda output: write(output, 2), None, {2}, id="a sound one written again"),
    ],
)


def fail_at_change(monkeypatch, count):
    """Let the `count`-th file or folder that is made, synced, renamed or removed meet a full disk."""
    done = [0]

    def refusing(original):
        def change(*arguments, **settings):
            done[0] += 1
            if done[0] == count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **settings)

        return change

    monkeypatch.setattr(io, "open", refusing(io.open))
    for name in ("mkdir", "fsync", "open", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return done


@for_every_start
def test_a_full_disk_at_any_moment(tmp_path, monkeypatch, caplog, prepare, limit, possible):
    found, refused, count = set(), 0, 0
    while True:
        count += 1
        output = tmp_path / f"run-{count}"
        prepare(output)
        with monkeypatch.context() as patch:
            done = fail_at_change(patch, count)
            try:
                write(output, 2, limit=limit)
                told = None
            except UserError as error:
                told = str(error)
        if told:
            assert "checkpoint-2: the checkpoint cannot be written (No space left on device)" in told
            refused += 1
        left = [name for name in names(output) if not name.startswith(".unfinished-removed-")]
        assert all(name.startswith("checkpoint-") for name in left), "no half of it is left"
        try:
            stored = find(output)
        except UserError:
            stored = None
        found.add(stored and stored.step)
        assert found <= possible, f"in {output.name}"
        assert told or stored.step == 2
        if stored:
            assert_sound(stored, stored.step)
        write(output, 2, limit=limit)  # and once there is room it goes on
        assert_sound(find(output), 2)
        if done[0] < count:
            break
    assert found == possible
    assert refused >= 2 * len(FILES) + 2, "every file is made and synced, and then the folders"


@pytest.mark.slow
@needs_fork
@ignore_fork_warning
@with_power_cut
@for_every_start
def test_killed_at_any_moment_there_is_a_sound_checkpoint(tmp_path, prepare, limit, possible, power_cut):
    found = set()
    for output, died in every_death(
        lambda output: write(output, 2, limit=limit), tmp_path, prepare, power_cut
    ):
        try:
            stored = find(output)
        except UserError:  # an error is what a lone damaged checkpoint would be
            stored = None
        found.add(stored and stored.step)
        assert found <= possible, f"in {output.name}"
        if stored:
            assert_sound(stored, stored.step)
        assert not [name for name in names(output) if name.startswith(".")], "leftovers are cleaned"
        if not died:
            assert stored.step == 2
        write(output, 2, limit=limit)  # and the resumed run gets on
        assert_sound(find(output), 2)
    assert found == possible


@pytest.mark.slow
@needs_fork
@ignore_fork_warning
@with_power_cut
def test_killed_at_any_moment_a_file_is_the_old_one_or_the_new_one(tmp_path, power_cut):
    contents = set()

    def prepare(folder):
        folder.mkdir()
        (folder / "file").write_bytes(b"old" * 1000)

    def work(folder):
        write_atomically(folder / "file", b"new!" * 1000)

    for folder, _ in every_death(work, tmp_path, prepare, power_cut):
        contents.add((folder / "file").read_bytes())
        write_atomically(folder / "file", b"again")
        assert names(folder) == ["file"], "what a killed process left is overwritten"
    assert contents == {b"old" * 1000, b"new!" * 1000}


# Files that are written whole.


@pytest.mark.parametrize("count", [1, 2])
def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch, count):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail_at(monkeypatch, count, errno.EIO)
    with pytest.raises(UserError, match="Input/output error"):
        write_atomically(path, b"new")
    assert path.read_bytes() == (b"old" if count == 1 else b"new"), "the second sync is that of the rename"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["none/file", "a file/file"])
def test_a_file_in_a_folder_that_is_none(tmp_path, place):
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written") as error:
        write_atomically(tmp_path / place, b"new")
    assert str(tmp_path / place) in str(error.value)


def test_a_file_on_a_disk_that_is_read_only(tmp_path):
    disk = tmp_path / "disk"
    problem = mounted(disk, "ro,size=64k")
    if problem:
        pytest.skip(f"cannot mount: {problem}")
    try:
        with pytest.raises(UserError, match="Read-only file system"):
            write_atomically(disk / "file", b"new")
        with pytest.raises(UserError, match="Read-only file system"):
            write_checkpoint(disk, make_checkpoint(1), None)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# The optimizer.


def make_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 8), (8, 4), (3,), (2, 2)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make_optimizer(parameters):
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "weight_decay": 1e-2},
        {"params": parameters[2:], "lr": 1e-3, "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)


def advance(parameters, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[:-1]:  # no gradient ever reaches the last one, so it has no state
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def make_prodigy(parameters):
    return Prodigy([{"params": parameters, "weight_decay": 1e-2}], safeguard_warmup=True)


@pytest.mark.parametrize("make_optimizer", [make_optimizer, make_prodigy])
def test_the_optimizer_goes_on_bit_for_bit(tmp_path, make_optimizer):
    expected = make_parameters()
    optimizer = make_optimizer(expected)
    advance(expected, optimizer, range(7))
    state = {name: tensor.clone() for name, tensor in flatten_optimizer(optimizer).items()}
    saved = [parameter.detach().clone() for parameter in expected]
    numbers = {"optimizer": optimizer_numbers(optimizer)}
    write_checkpoint(tmp_path, Checkpoint(7, save({}), state, SETTINGS, numbers), None)
    advance(expected, optimizer, range(7, 15))

    resumed = make_parameters(seed=1)
    for parameter, value in zip(resumed, saved, strict=True):
        parameter.data.copy_(value)
    other = make_optimizer(resumed)
    advance(resumed, other, [99])  # state of its own, which must go
    for parameter, value in zip(resumed, saved, strict=True):
        parameter.data.copy_(value)
    other.param_groups[0]["lr"] = 1e-2
    stored = find(tmp_path)
    restore_optimizer(other, stored.tensors(OPTIMIZER_NAME), stored.scalars["optimizer"])
    assert_same_tensors(flatten_optimizer(other), state)
    advance(resumed, other, range(7, 15))
    for actual, wanted in zip(resumed, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert_same_tensors(flatten_optimizer(other), flatten_optimizer(optimizer))
    assert optimizer_numbers(other) == optimizer_numbers(optimizer)


def test_the_optimizer_by_name():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    assert flatten_optimizer(optimizer) == {}
    advance(parameters, optimizer, [0])
    flat = flatten_optimizer(optimizer)
    assert set(flat) == {f"{i}.{name}" for i in range(3) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert flat["1.step"].item() == 1
    torch.testing.assert_close(flat["1.exp_avg"], 0.2 * parameters[1].grad)
    torch.testing.assert_close(flat["1.exp_avg_sq"], 0.05 * parameters[1].grad.square())


def test_restoring_brings_back_the_numbers_of_each_group():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    advance(parameters, optimizer, [0])
    other = make_optimizer(parameters)
    other.param_groups[0]["lr"] = 0.5
    restore_optimizer(other, flatten_optimizer(optimizer), optimizer_numbers(optimizer))
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in other.param_groups] == [1e-2, 0.1]


# The adapter.

RANK, ALPHA = 4, 10.0


def trained_models(seed=0, text_encoders=True, rank=RANK):
    """The models of a pipeline with adapters of which both A and B are far from zero."""
    pipeline = build_pipeline()
    models = {"unet": pipeline.unet}
    if text_encoders:
        models |= {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    for model in models.values():
        model.requires_grad_(False)
    add_lora(models, rank=rank, alpha=ALPHA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.eval()
    return models, pipeline


def all_tensors(models):
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
    }


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    models, _ = trained_models()
    (tmp_path / WEIGHTS_NAME).write_bytes(adapter_bytes(models, {}))
    other, _ = trained_models(seed=1)
    assert not torch.equal(*(next(iter(adapter_tensors(m).values())) for m in (models, other)))
    load_adapter_tensors(other, read_tensors(tmp_path / WEIGHTS_NAME))
    assert_same_tensors(all_tensors(other), all_tensors(models))
    trainable = [[n for n, p in model.named_parameters() if p.requires_grad] for model in other.values()]
    assert trainable == [
        [n for n, p in model.named_parameters() if p.requires_grad] for model in models.values()
    ]


@pytest.mark.slow
def test_the_same_adapter_is_the_same_file():
    assert adapter_bytes(trained_models()[0], {"a": 1, "b": 2}) == adapter_bytes(
        trained_models()[0], {"b": 2, "a": 1}
    )


@pytest.mark.parametrize("text_encoders", [False, True])
def test_names_in_the_file_are_those_of_diffusers(text_encoders):
    models, _ = trained_models(text_encoders=text_encoders)
    tensors = adapter_tensors(models)
    attentions = sum(isinstance(module, Attention) for module in models["unet"].modules())
    parts = collections.Counter(key.partition(".")[0] for key in tensors)
    expected = {"unet": attentions * 4 * 2}  # four projections, A and B
    if text_encoders:
        expected |= {"text_encoder": 3 * 4 * 2, "text_encoder_2": 3 * 4 * 2}  # three layers each
    assert parts == expected
    for key in tensors:
        part = key.split(".", 1)[0]
        assert part == "unet" or key.startswith(f"{part}.text_model.encoder.layers.")
        assert key.endswith(
            (".lora.down.weight", ".lora.up.weight", ".lora_A.weight", ".lora_B.weight", ".weight")
        )
        assert "default" not in key


def without_one_layer(tensors):
    return dict(list(tensors.items())[1:])


def with_a_stranger(tensors):
    return tensors | {"unet.stranger.lora_A.weight": torch.zeros(1)}


@pytest.mark.parametrize("change", [without_one_layer, with_a_stranger])
def test_an_adapter_with_other_layers_is_refused(change):
    models, _ = trained_models()
    before = all_tensors(models)
    with pytest.raises(UserError, match="other layers or another rank"):
        load_adapter_tensors(models, change(adapter_tensors(trained_models(seed=1)[0])))
    assert_same_tensors(all_tensors(models), before)


def test_an_adapter_of_another_rank_or_without_text_encoders_is_refused():
    models, _ = trained_models()
    for other in (trained_models(rank=2)[0], trained_models(text_encoders=False)[0]):
        with pytest.raises(UserError, match="other layers or another rank"):
            load_adapter_tensors(models, adapter_tensors(other))
        with pytest.raises(UserError, match="other layers or another rank"):
            load_adapter_tensors(other, adapter_tensors(models))


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True])
def test_diffusers_loads_the_file_with_the_same_outputs(tmp_path, text_encoders):
    models, own = trained_models(text_encoders=text_encoders)
    write_atomically(tmp_path / WEIGHTS_NAME, adapter_bytes(models, {"method": "Flat-LoRA"}))
    pipeline, base = build_pipeline(), build_pipeline()
    pipeline.load_lora_weights(tmp_path)

    def outputs(pipeline):
        with torch.no_grad():
            sample = pipeline.unet(**unet_inputs(), return_dict=False)[0]
            tokens, _, pooled, _ = pipeline.encode_prompt("a fox, icon", do_classifier_free_guidance=False)
        return sample, tokens, pooled

    for name, actual, expected, plain in zip(
        ("unet", "tokens", "pooled"), outputs(pipeline), outputs(own), outputs(base), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        changed = (expected - plain).norm() / plain.norm()
        if name == "unet" or text_encoders:
            assert changed > 0.01, f"the adapter must show in {name}"
        else:
            assert changed == 0


def test_the_file_says_how_it_was_made(tmp_path):
    models, _ = trained_models()
    config = TrainConfig(
        pretrained_model_name_or_path="base",
        instance_data_dir="icons",
        instance_prompt="an icon",
        rank=RANK,
        lora_alpha=ALPHA,
        train_text_encoder=True,
        flat_sigma=0.2,
        flat_schedule="linear",
        seed=3,
    )
    facts = record.facts(config, SETTINGS, models, 12)
    (tmp_path / "a.safetensors").write_bytes(adapter_bytes(models, facts))
    assert read_facts(tmp_path / "a.safetensors") == facts
    expected = {
        "method": "Flat-LoRA",
        "base": "base",
        "instance_prompt": "an icon",
        "rank": RANK,
        "alpha": ALPHA,
        "flat_sigma": 0.2,
        "flat_schedule": "linear",
        "flat_noise": "table",
        "seed": 3,
        "steps": 12,
        "targets": {
            "unet": sorted(UNET_TARGETS),
            "text_encoder": sorted(TEXT_ENCODER_TARGETS),
            "text_encoder_2": sorted(TEXT_ENCODER_TARGETS),
        },
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["versions"]["torch"] == torch.__version__
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    lora = json.loads(metadata["lora_adapter_metadata"])
    for part, targets in expected["targets"].items():
        assert (lora[f"{part}.r"], lora[f"{part}.lora_alpha"]) == (RANK, ALPHA)
        assert lora[f"{part}.target_modules"] == targets


def test_saving_changes_no_model():
    models, _ = trained_models()
    before = all_tensors(models)
    first = copy.copy(adapter_bytes(models, {}))
    assert_same_tensors(all_tensors(models), before)
    assert adapter_bytes(models, {}) == first


def test_facts_of_a_file_from_elsewhere(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert read_facts(tmp_path / "bare.safetensors") == read_facts(tmp_path / "other.safetensors") == {}


@pytest.mark.parametrize("read", [read_facts, read_tensors])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "garbage"])
def test_damaged_files_are_named(tmp_path, read, damage):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path, metadata={FLAT_METADATA_KEY: "{}"})
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="not a sound safetensors file") as error:
        read(path)
    assert str(path) in str(error.value)
