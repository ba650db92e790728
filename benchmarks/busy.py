"""What a step of the demo's training costs on an idle processor, and beside another such training.

    python -m benchmarks.busy                                    # as it comes, and as commands set it if busy
    python -m benchmarks.busy --spins 1000 100000 --one-thread --repeats 20

The threads of OpenMP spin before they sleep. Two programs that do so on the same cores take them from each
other: the one's threads spin where those should run for which they wait. Each way to wait has two trainings,
in processes of their own, that take a step when they are told to. One is timed while all others sleep, while
the other is at work without a pause, and while one is that waits as it comes: so goes the second of two
trainings, which finds the machine busy, beside the first. Then the first is timed beside the second. All ways
take turns, in an order that rotates; ratios are taken repeat by repeat against the first way on the idle
processor. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.arms import ARMS, Process
from benchmarks.common import DEMO_BASE, add_common_options, benchmark_parser, machine, positive, write_report
from benchmarks.trainer import DEMO_RESOLUTION, PAUSE, Case, ratio, rotated

ARM = "Flat-LoRA"
AS_IT_COMES = "as it comes"
KINDS = ("idle", "beside its like", f"beside one {AS_IT_COMES}", "what that one takes")
# What decides how many threads there are and how they wait; the user's own doesn't count here.
_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def environments(spins: list[int], one_thread: bool) -> dict[str, dict[str, str]]:
    """Name of a way to wait -> what it sets."""
    ways = {AS_IT_COMES: {}, "asleep (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"}}
    ways |= {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in spins}
    if one_thread:
        ways["OMP_NUM_THREADS=1"] = {"OMP_NUM_THREADS": "1"}
    return ways


def measure(
    ways: Mapping[str, Mapping[str, str]], repeats: int, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Seconds of the steps: name of a way -> each of `KINDS` -> repeats.

    Args:
        ways: Name -> the environment of its processes.
        repeats: Steps that are timed, of each kind.
        folder: For what the trainings write.
    """
    seconds = {way: {kind: [] for kind in KINDS} for way in ways}
    with contextlib.ExitStack() as stack:
        pairs: dict[str, list[Process]] = {}
        for index, (way, environment) in enumerate(ways.items()):
            pairs[way] = []
            for place in "ab":
                with _environment(environment):
                    pairs[way].append(_training(folder / f"{index}{place}"))
                stack.callback(pairs[way][-1].kill)
        for repeat in range(-1, repeats):  # the first warms up
            for way in rotated(list(ways), repeat):
                timed, like = pairs[way]
                first = pairs[AS_IT_COMES][1]
                taken = [_step(timed), _step(timed, like), _step(timed, first), _step(first, timed)]
                if repeat >= 0:
                    for kind, one in zip(KINDS, taken, strict=True):
                        seconds[way][kind].append(one)
    return seconds


def report(seconds: Mapping[str, Mapping[str, list[float]]]) -> str:
    """What was measured in Markdown."""
    idle = seconds[AS_IT_COMES]["idle"]
    lines = [
        "## Training on a busy machine",
        "",
        f"{machine()}.",
        "",
        f"Seconds a step, medians of {len(idle)} repeats; x idle {AS_IT_COMES} (least-greatest).",
        "",
        f"| | {' | '.join(KINDS)} |",
        f"|---|{'--:|' * len(KINDS)}",
    ]
    for way, own in seconds.items():
        cells = [f"{statistics.median(taken):.3f}; {ratio(taken, idle)}" for taken in own.values()]
        lines.append(f"| {' | '.join([way, *cells])} |")
    return "\n".join(lines) + "\n"


def _training(folder: Path) -> Process:
    case = Case("demo", DEMO_BASE, DEMO_RESOLUTION, "no", False, batch_size=4)
    config = case.config(ARMS[ARM], folder, steps=1_000_000)  # it is killed long before
    return Process(
        ARM,
        dataclasses.replace(config, train_text_encoder=True),
        [],
        folder.with_suffix(".log"),
        folder.with_suffix(".kept"),
    )


def _step(timed: Process, beside: Process | None = None) -> float:
    """Seconds of a step, while another process takes one after the other."""
    time.sleep(PAUSE)
    with contextlib.nullcontext() if beside is None else _at_work(beside):
        return timed.step()


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Of the settings that count just these, for processes that start within the block."""
    before = dict(os.environ)
    try:
        for name in _SETTINGS:
            os.environ.pop(name, None)
        os.environ.update(wanted)
        yield
    finally:
        for name in _SETTINGS:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def _at_work(process: Process) -> Iterator[None]:
    """Within the block the process takes step after step."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            process.step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        time.sleep(PAUSE)
        yield
    finally:
        over.set()
        thread.join()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser("busy", __doc__)
    parser.add_argument("--spins", type=positive, nargs="*", default=[], help="spin counts to try as well")
    parser.add_argument("--one-thread", action="store_true", help="try one thread")
    parser.add_argument("--repeats", type=positive, default=10, help="steps of each kind (10)")
    add_common_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the report."""
    options = parse(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    ways = environments(options.spins, options.one_thread)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(ways, options.repeats, Path(folder))
    write_report(report(seconds), {"seconds": seconds}, options.output)


if __name__ == "__main__":
    main()
