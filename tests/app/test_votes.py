"""Votes of a blind test: kept whatever happens, and counted as statistics has it."""

import dataclasses
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from flatlora_diffusion.app.votes import TIE, Tally, Vote, VoteFile
from flatlora_diffusion.common.errors import UserError
from tests.processes import in_processes

HASHES = {"LoRA": "a" * 64, "Flat-LoRA": "b" * 64}
VOTE = Vote("a red icon", 3, "LoRA", "Flat-LoRA", "Flat-LoRA", HASHES, {"steps": 30})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "votes.jsonl"


def tally(one_wins, other_wins, ties=0):
    return Tally("LoRA", "Flat-LoRA", one_wins, other_wins, ties)


def test_votes_are_read_as_they_were_cast(path):
    file = VoteFile(path)
    assert file.votes() == [] and not path.parent.exists()
    timed = dataclasses.replace(VOTE, time="2026-01-02T03:04:05+00:00", prompt="line\nünïcode \u2028")
    before = datetime.now(UTC).replace(microsecond=0)
    first, second = file.add(VOTE), file.add(timed)
    assert second == timed and dataclasses.replace(first, time=None) == VOTE
    cast = datetime.fromisoformat(first.time)
    assert cast.utcoffset().total_seconds() == 0
    assert before <= cast <= datetime.now(UTC)
    assert VoteFile(path).votes() == [first, timed]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"right": "LoRA"}, "on two methods"),
        ({"left": TIE}, "neither called 'tie'"),
        ({"chosen": "base"}, "'base' is none of"),
        ({"hashes": {"LoRA": None}}, "not of the two methods shown"),
    ],
)
def test_a_vote_that_says_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VOTE, **changes)


def test_a_tally_counts_the_votes_on_these_two_adapters_whatever_the_sides(path):
    file = VoteFile(path)
    base = {"base": None, "LoRA": HASHES["LoRA"]}
    retrained = HASHES | {"Flat-LoRA": "c" * 64}
    for vote in (
        *([VOTE] * 3),
        Vote("a", 0, "Flat-LoRA", "LoRA", "LoRA", HASHES),
        Vote("a", 0, "Flat-LoRA", "LoRA", TIE, HASHES),
        Vote("a", 0, "base", "LoRA", "LoRA", base),
        Vote("a", 0, "LoRA", "Flat-LoRA", "LoRA", retrained),
    ):
        file.add(vote)
    assert file.tally("LoRA", "Flat-LoRA", HASHES | base) == Tally("LoRA", "Flat-LoRA", 1, 3, 1)
    assert file.tally("Flat-LoRA", "LoRA", HASHES) == Tally("Flat-LoRA", "LoRA", 3, 1, 1)
    assert file.tally("base", "LoRA", base) == Tally("base", "LoRA", 0, 1, 0)
    assert file.tally("LoRA", "Flat-LoRA", retrained) == Tally("LoRA", "Flat-LoRA", 1, 0, 0)
    assert file.tally("LoRA", "base", base | {"LoRA": "d" * 64}) == Tally("LoRA", "base", 0, 0, 0)


def test_threads_and_processes_lose_no_vote_and_mix_no_lines(path):
    def add(rank):
        file = VoteFile(path)
        with ThreadPoolExecutor(4) as threads:
            votes = [dataclasses.replace(VOTE, seed=100 * rank + index) for index in range(100)]
            list(threads.map(file.add, votes))

    in_processes(add, count=3)
    votes = VoteFile(path).votes()
    assert sorted(vote.seed for vote in votes) == list(range(300))
    assert path.read_bytes().count(b"\n") == 300


def test_what_a_killed_process_left_of_a_line_is_passed_over_and_mended(path):
    file = VoteFile(path)
    whole = file.add(dataclasses.replace(VOTE, prompt="a" * 9000))
    content = path.read_bytes()
    for torn in range(len(content)):
        if 60 < torn < len(content) - 60 and torn % 500:
            continue  # the ends, and some of the middle
        path.write_bytes(content + content[:torn])
        kept = 2 if torn == len(content) - 1 else 1  # only the line's end is missing
        assert file.votes() == [whole] * kept
        added = file.add(VOTE)
        assert file.votes() == [whole] * kept + [added]
        assert path.read_bytes().count(b"\n") == kept + 1


def test_a_vote_that_cannot_be_written_whole_leaves_the_file_as_it_was(path, monkeypatch):
    file = VoteFile(path)
    file.add(VOTE)
    content = path.read_bytes()

    def full(descriptor):
        assert path.stat().st_size > len(content)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"votes\.jsonl: cannot be written \(No space left on device\)"):
            file.add(VOTE)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["notes without an end", "[1]", '{"other": 1}', "torn\nhalf"])
def test_a_file_of_something_else_is_named_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: not a file of votes; name another file")):
        VoteFile(path).add(VOTE)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "line", ["junk", "[]", "{}", json.dumps({"prompt": "a", "chosen": "b"}), "[" * 99_999]
)
def test_a_line_that_is_no_vote_is_named(path, line):
    VoteFile(path).add(VOTE)
    path.write_text(f"{path.read_text()}{line}\n{path.read_text()}")
    with pytest.raises(UserError, match=r"votes\.jsonl: line 2 is not a vote; take it out"):
        VoteFile(path).votes()


def test_a_folder_in_the_way_is_named(tmp_path):
    for method in (VoteFile(tmp_path).votes, lambda: VoteFile(tmp_path).add(VOTE)):
        with pytest.raises(UserError, match="Is a directory"):
            method()


@pytest.mark.parametrize(
    ("wins", "losses", "low", "high"),
    [
        # statsmodels' proportion_confint(wins, n, method="wilson"); Newcombe 1998 prints the first four.
        (81, 182, 0.2553, 0.3662),
        (15, 133, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 28, 0.0061, 0.1718),
        (10, 0, 0.7225, 1.0),
        (5, 5, 0.2366, 0.7634),
    ],
)
def test_the_interval_is_wilsons(wins, losses, low, high):
    met = tally(wins, losses, ties=7)
    assert met.interval == pytest.approx((low, high), abs=5e-5)
    assert met.share == wins / (wins + losses)
    # The ends are the shares from which what was seen is as far as the interval allows: where the score
    # (p - share) / sqrt(share (1 - share) / n) is 1.96.
    n = wins + losses
    for end in met.interval:
        if 0 < end < 1:
            score = (wins / n - end) / math.sqrt(end * (1 - end) / n)
            assert abs(score) == pytest.approx(1.959963985)
    mirrored = tally(losses, wins).interval
    assert mirrored == pytest.approx((1 - met.interval[1], 1 - met.interval[0]))


def test_the_interval_ends_at_0_and_1_exactly():
    for n in range(1, 60):
        assert tally(n, 0).interval[1] == 1.0 and tally(0, n).interval[0] == 0.0


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (10, 0, 2 / 1024),
        (8, 2, 2 * (1 + 10 + 45) / 1024),  # 0.109
        (5, 5, 1.0),
        (1, 0, 1.0),
        (3, 4, 1.0),
        (0, 2000, 2.0**-1999),
    ],
)
def test_the_p_value_is_that_of_the_sign_test(wins, losses, expected):
    assert tally(wins, losses).p_value == expected
    assert tally(losses, wins, ties=5).p_value == expected


def test_without_decided_votes_nothing_is_known():
    met = tally(0, 0, ties=4)
    assert (met.share, met.interval, met.p_value) == (None, (0.0, 1.0), 1.0)
