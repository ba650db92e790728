"""What is kept of encoders: found again by content with the same bits, bounded, and never in the way."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flatlora_diffusion.common.files import user_cache_folder
from flatlora_diffusion.data.encodings import Encodings

CPU = torch.device("cpu")


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 2)


def fill(kept, shown=(1.0, 2.0), encoder=None, writes=True):
    """What came of each of the inputs shown, and which of them had to be encoded."""
    made = []

    def encode(value):
        made.append(value)
        return torch.full((2, 3), value), torch.tensor([value, float("nan")], dtype=torch.bfloat16)

    with kept.of("things", [encoder or model()], CPU, writes=writes) as things:
        results = [things.get([torch.tensor([value])], lambda value=value: encode(value)) for value in shown]
    return results, made


def bits(results):
    return [(t.dtype, t.shape, t.contiguous().view(torch.uint8).tolist()) for pair in results for t in pair]


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_what_was_encoded_is_found_again_with_the_same_bits(tmp_path, caplog):
    caplog.set_level("INFO")
    first, made = fill(Encodings(tmp_path))
    assert made == [1.0, 2.0] and len(files(tmp_path)) == 1
    second, made = fill(Encodings(tmp_path), (2.0, 3.0, 1.0))
    assert made == [3.0] and len(files(tmp_path)) == 2
    assert bits([second[2], second[0]]) == bits(first)
    assert caplog.messages == [
        f"things: 0 found in {tmp_path}, 2 encoded",
        f"things: 2 found in {tmp_path}, 1 encoded",
    ]


def test_without_a_folder_it_serves_this_process(caplog):
    caplog.set_level("INFO")
    kept = Encodings()
    first, _ = fill(kept)
    second, made = fill(kept)
    assert not made and bits(first) == bits(second) and not caplog.messages


@pytest.mark.parametrize("what", ["weights", "input", "threads", "settings"])
def test_what_was_made_otherwise_is_not_taken(tmp_path, monkeypatch, what):
    fill(Encodings(tmp_path))
    encoder, shown = model(seed=int(what == "weights")), (1.5,) if what == "input" else (1.0,)
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    if what == "settings":
        encoder.config = {"scaling_factor": 2, "_name_or_path": "elsewhere"}
    assert fill(Encodings(tmp_path), shown, encoder)[1] == list(shown)


def test_where_a_model_was_loaded_from_does_not_count(tmp_path):
    for place in ("here", "there"):
        encoder = model()
        encoder.config = {"_name_or_path": place}
        made = fill(Encodings(tmp_path), encoder=encoder)[1]
    assert not made


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "another file"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, caplog, damage):
    fill(Encodings(tmp_path))
    (path,) = files(tmp_path)
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(
        {"cut": content[:-9], "emptied": b"", "flipped": flipped, "another file": b"GIF89a" * 9}[damage]
    )
    first, made = fill(Encodings(tmp_path))
    assert made and len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{path}: damaged (")
    assert not path.exists()
    second, made = fill(Encodings(tmp_path))
    assert not made and len(caplog.messages) == 1 and bits(first) == bits(second)


def test_files_used_longest_ago_go_first_and_others_stay(tmp_path):
    other = tmp_path / "mine.safetensors"
    other.write_bytes(bytes(10_000))
    for age, value in ((30, 1.0), (20, 2.0), (10, 3.0)):
        before = files(tmp_path)
        fill(Encodings(tmp_path), (value,))
        (new,) = set(files(tmp_path)) - set(before)
        os.utime(new, (new.stat().st_mtime - age,) * 2)
        size = new.stat().st_size
    fill(Encodings(tmp_path), (1.0,))  # used again
    fill(Encodings(tmp_path, most_bytes=3 * size), (4.0,))
    assert other.exists()
    assert fill(Encodings(tmp_path), (1.0, 2.0, 3.0, 4.0), writes=False)[1] == [2.0]


def test_what_a_killed_process_left_unfinished_is_removed_after_a_day(tmp_path):
    ours = [f".{16 * letter}-{32 * letter}.safetensors.tmp" for letter in "ab"]
    old, young, other = (tmp_path / name for name in (*ours, "mine.tmp"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    fill(Encodings(tmp_path))
    assert not old.exists() and young.exists() and other.exists()


def test_two_at_once_leave_each_other_alone(tmp_path):
    one, two = (Encodings(tmp_path).of("things", [model()], CPU) for _ in range(2))
    pair = torch.ones(2), torch.zeros(2)
    with one, two:
        for things in (one, two):
            things.get([torch.tensor([1.0])], lambda: pair)
    assert len(files(tmp_path)) == 2
    assert not fill(Encodings(tmp_path), (1.0,))[1]


def test_a_file_that_another_process_removes_meanwhile_is_made_anew(tmp_path, caplog, monkeypatch):
    fill(Encodings(tmp_path))
    things = Encodings(tmp_path).of("things", [model()], CPU)
    (path,) = files(tmp_path)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [path])
    path.unlink()
    with things:
        assert things.get([torch.tensor([1.0])], lambda: (torch.ones(1), torch.ones(1)))
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "encodings"
    results, made = fill(Encodings(folder))
    assert made == [1.0, 2.0] and len(results) == 2
    (message,) = caplog.messages
    assert message.startswith("things are not kept for later runs: ") and str(folder) in message


def test_of_several_processes_one_writes(tmp_path):
    fill(Encodings(tmp_path / "kept"), writes=False)
    assert not (tmp_path / "kept").exists()


def test_files_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("flatlora_diffusion.data.encodings._FILE_BYTES", 50)
    results, _ = fill(Encodings(tmp_path), (1.0, 2.0, 3.0, 4.0))
    assert len(files(tmp_path)) == 2
    for path in files(tmp_path):
        with safe_open(path, "pt") as file:
            assert len(file.metadata()) == 2
    again, made = fill(Encodings(tmp_path), (1.0, 2.0, 3.0, 4.0))
    assert not made and bits(again) == bits(results)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "HOME/.cache/name"),
        ("darwin", {}, "HOME/Library/Caches/name"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/name/Cache"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/name"),
        ("linux", {"XDG_CACHE_HOME": "xdg", "CHOSEN": "~/own"}, "HOME/own"),
        ("linux", {"CHOSEN": ""}, "HOME/.cache/name"),
    ],
)
def test_the_users_cache_folder(monkeypatch, tmp_path, platform, environment, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "CHOSEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert user_cache_folder("CHOSEN", "name") == Path(expected.replace("HOME", str(tmp_path)))


def test_a_user_without_a_home_has_none(monkeypatch):
    for name in ("XDG_CACHE_HOME", "CHOSEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert user_cache_folder("CHOSEN", "name") is None
