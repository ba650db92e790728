"""The votes of a blind test, in a local file, and what they say.

The file has one JSON object a line. It is only ever appended to, under a lock, by any number of threads and
processes. What a killed process left of a line is passed over, and cut off by the next vote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import sync_folder

TIE = "tie"
_START = b'{"prompt": '  # of every line
_Z = statistics.NormalDist().inv_cdf(0.975)  # of a two-sided interval of 95%


@dataclass(frozen=True)
class Vote:
    """One answer to two pictures side by side.

    Attributes:
        prompt: Of both pictures.
        seed: Of both.
        left: Label of the method that was shown on the left.
        right: Label of the other.
        chosen: The label that was preferred, or `tie`.
        hashes: Label -> sha256 of its adapter's file, in hex; None for the base.
        settings: What else both were drawn with: steps, guidance, size.
        time: ISO 8601, UTC; None until the vote is in a file.

    Raises:
        ValueError: The labels don't tell two methods and a tie apart, or a hash is missing.
    """

    prompt: str
    seed: int
    left: str
    right: str
    chosen: str
    hashes: dict[str, str | None]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    time: str | None = None

    def __post_init__(self) -> None:
        if len({self.left, self.right, TIE}) < 3:
            raise ValueError(
                f"{self.left!r} and {self.right!r}: a vote is on two methods, neither called {TIE!r}"
            )
        if self.chosen not in (self.left, self.right, TIE):
            raise ValueError(f"{self.chosen!r} is none of {self.left!r}, {self.right!r} and {TIE!r}")
        if self.hashes.keys() != {self.left, self.right}:
            raise ValueError(f"the hashes are those of {sorted(self.hashes)}, not of the two methods shown")


@dataclass(frozen=True)
class Tally:
    """The votes on one pair of adapters.

    Attributes:
        one: Label of the first method.
        other: Label of the second.
        one_wins: Votes for the first.
        other_wins: Votes for the second.
        ties: Votes for neither, which decide nothing.
    """

    one: str
    other: str
    one_wins: int
    other_wins: int
    ties: int

    @property
    def decided(self) -> int:
        """Votes for either."""
        return self.one_wins + self.other_wins

    @property
    def share(self) -> float | None:
        """Of the first among the decided votes; None without any."""
        return self.one_wins / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share, 95%, by Wilson's score; (0, 1) without decided votes."""
        wins, n = self.one_wins, self.decided
        if not n:
            return 0.0, 1.0
        centre = wins + _Z**2 / 2
        spread = _Z * math.sqrt(wins * (n - wins) / n + _Z**2 / 4)
        low = (centre - spread) / (n + _Z**2) if wins else 0.0  # without rounding at the ends
        return low, (centre + spread) / (n + _Z**2) if wins < n else 1.0

    @property
    def p_value(self) -> float:
        """Of the exact two-sided sign test: how likely a coin would decide at least as one-sidedly."""
        fewer = min(self.one_wins, self.other_wins)
        tail = sum(math.comb(self.decided, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**self.decided)


class VoteFile:
    """Votes on the disk.

    Args:
        path: Made with the first vote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, vote: Vote) -> Vote:
        """Append a vote; when this returns, it is on the disk.

        Returns:
            The vote with its time: the present, where it had none.

        Raises:
            UserError: The file cannot be written, or is not one of votes.
        """
        if vote.time is None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            vote = dataclasses.replace(vote, time=now)
        line = json.dumps(dataclasses.asdict(vote)).encode() + b"\n"
        with self._errors("written"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                lock_descriptor(file.fileno())  # until the file is closed
                end = self._mend(file)
                try:
                    if file.write(line) != len(line):
                        raise OSError("the disk is full")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            if not end:
                sync_folder(self._path.parent)
        return vote

    def votes(self) -> list[Vote]:
        """All votes, the oldest first.

        Raises:
            UserError: The file cannot be read, or a line in it is no vote.
        """
        with self._errors("read"):
            try:
                with self._path.open("rb") as file:
                    lock_descriptor(file.fileno())
                    content = file.read()
            except FileNotFoundError:
                return []
        *lines, tail = content.split(b"\n")
        votes = []
        for number, line in enumerate(lines, start=1):
            if (vote := _parsed(line)) is None:
                raise UserError(
                    f"{self._path}: line {number} is not a vote; take it out, or move the file away"
                )
            votes.append(vote)
        last = _parsed(tail)
        return [*votes, last] if last else votes

    def tally(self, one: str, other: str, hashes: Mapping[str, str | None]) -> Tally:
        """The votes on two methods with the adapters that they have now: a retrained one starts at zero.

        Args:
            one: Label of the first.
            other: Label of the second.
            hashes: Label -> sha256 of its adapter's file, None for the base; of these two at least.

        Raises:
            UserError: The file cannot be read.
        """
        pair = {label: hashes[label] for label in (one, other)}
        chosen = [vote.chosen for vote in self.votes() if vote.hashes == pair]
        return Tally(one, other, *(chosen.count(label) for label in (one, other, TIE)))

    def _mend(self, file: FileIO) -> int:
        """Make the file end with a whole line; its length then."""
        file.seek(0)
        content = file.readall()
        end, tail = len(content), content.rpartition(b"\n")[2]
        if _parsed(tail):  # somebody's editor took the line's end away
            return end + file.write(b"\n")
        if not tail.startswith(_START[: len(tail)]):
            raise UserError(f"{self._path}: not a file of votes; name another file")
        file.truncate(end - len(tail))
        return end - len(tail)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self._path}: cannot be {what} ({reason}); name another file") from error


def _parsed(line: bytes) -> Vote | None:
    try:
        return Vote(**json.loads(line))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
