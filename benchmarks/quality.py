"""Whether Flat-LoRA personalises better and forgets less than plain LoRA, on the demo base.

    python -m benchmarks.quality train --folder WORK --seeds 5      # hours on two cores; goes on where it was
    python -m benchmarks.quality train --folder WORK --arms 'mild-*' sam-0.2
    python -m benchmarks.quality measure --folder WORK
    python -m benchmarks.quality report --folder WORK --output quality.md

`train` trains the arms of `benchmarks.quality_arms`: plain LoRA, Flat-LoRA of several strengths, and what
else is said to generalise. Every arm of a seed has the same initial adapter, data order, timesteps and noise.
Each run has one thread and a process of its own, `--jobs` of them at a time, and leaves in
`WORK/runs/ARM/seed-K` what `train_dreambooth_flat.py` leaves, and what it said in `train.log`. Finished runs
are not trained again. A run that fails is named, and the others go on; the exit code is then 1. Ctrl-C ends
all of them. Where an arm has other settings than one of its finished runs, nothing begins: the run is named.

`measure` measures the finished runs in the same way, each once: see `benchmarks.adapter_measures`.

`report` makes tables of what was measured of the runs: see `benchmarks.quality_report`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.common import positive
from benchmarks.quality_arms import ASSETS, FEW_ICONS, Arm, make_arms, run_folder
from benchmarks.quality_figures import write_figures
from benchmarks.quality_measures import PARTS, read_runs
from benchmarks.quality_report import report
from benchmarks.quality_runs import change_since, is_finished, record_rival
from flatlora_diffusion.common.command import OneLineParser, run_command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.common.lock import check_writable

Task = tuple[str, int]
"""Name of an arm, and a seed."""


def train_run(work: Path, task: Task) -> None:
    """Train one arm with one seed."""
    from benchmarks import rivals
    from flatlora_diffusion.train.arms import train

    name, seed = task
    arm = make_arms()[name]
    folder = run_folder(work, name, seed)
    config = arm.config(seed, folder, work)
    record_rival(arm, folder)
    if arm.rival:
        rivals.train(config, arm.rival, arm.rho)
    else:
        train(config)


def measure_run(work: Path, task: Task, parts: Sequence[str]) -> None:
    """Measure one finished run."""
    from benchmarks.adapter_measures import Measures

    name, seed = task
    Measures(work).measure(make_arms()[name], run_folder(work, name, seed), parts)


@dataclass(frozen=True)
class Job:
    """Something to do with every run, on one thread and in a process of its own.

    Attributes:
        verb: What the log is called after.
        work: Does it, given the folder of all runs.
        is_needed: Whether a run still needs it, given the arm and the run's folder.
        preload: Module that brings the libraries.
    """

    verb: str
    work: Callable[[Path, Task], None]
    is_needed: Callable[[Arm, Path], bool]
    preload: str


def needs_training(arm: Arm, folder: Path) -> bool:
    """Whether a run isn't finished."""
    return not is_finished(folder)


def needs_measuring(arm: Arm, folder: Path, parts: Sequence[str]) -> bool:
    """Whether one of the parts is still to be measured of a finished run."""
    from benchmarks.adapter_measures import missing_parts

    return is_finished(folder) and not missing_parts(arm, folder).isdisjoint(parts)


def training() -> Job:
    """Train what isn't trained."""
    return Job("train", train_run, needs_training, "benchmarks.rivals")


def measuring(parts: Sequence[str]) -> Job:
    """Measure some of `quality_measures.PARTS`."""
    work, is_needed = partial(measure_run, parts=parts), partial(needs_measuring, parts=parts)
    return Job("measure", work, is_needed, "benchmarks.adapter_measures")


def run_all(job: Job, work: Path, tasks: Sequence[Task], jobs: int) -> list[Task]:
    """Do the job for every run that needs it, so many at a time, and say how each ends; those that failed.

    However this is left, no run goes on behind it.
    """
    # Each run is forked from a server that has imported what all of them need, and has computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([job.preload])
    arms = make_arms()
    waiting = [task for task in tasks if job.is_needed(arms[task[0]], run_folder(work, *task))]
    running: dict[int, tuple[Task, BaseProcess, float]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                process = context.Process(target=_logged, args=(job, work, task), daemon=True)
                process.start()
                running[process.sentinel] = task, process, time.perf_counter()
            for sentinel in wait(list(running)):
                task, process, began = running.pop(sentinel)
                process.join()
                name, seed = task
                if process.exitcode:
                    failed.append(task)
                    words = _last_words(log_file(job, work, task), process)
                    print(f"{name} seed {seed} failed: {words}", file=sys.stderr)
                else:
                    print(f"{name} seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.join()
    return failed


def log_file(job: Job, work: Path, task: Task) -> Path:
    """Where a job says what it does for a run."""
    return run_folder(work, *task) / f"{job.verb}.log"


def _logged(job: Job, work: Path, task: Task) -> None:
    """Work in this process, which writes to the run's log alone."""
    # A terminal's Ctrl-C comes to all processes: it is for the first one to end the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = log_file(job, work, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    run_command(lambda: _on_one_thread(job, work, task))


def _on_one_thread(job: Job, work: Path, task: Task) -> None:
    import torch

    torch.set_num_threads(1)
    job.work(work, task)


def _last_words(log: Path, process: BaseProcess) -> str:
    """Why a process ended: its signal, or the last line of its log."""
    if process.exitcode < 0:
        return f"ended by {signal.Signals(-process.exitcode).name} (see {log})"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = next((line for line in reversed(lines) if line.strip()), f"exit code {process.exitcode}")
    return f"{said.removeprefix('error: ')} (see {log})"


def prepare(work: Path, arms: Sequence[Arm]) -> None:
    """Make what several runs share: the folder with a few of the icons, and the class images."""
    for arm in arms:
        if arm.settings.get("with_prior_preservation"):
            from flatlora_diffusion.train.class_images import class_samples

            class_samples(arm.config(0, work, work))  # the same ones for every seed
            break
    few = work / "few-icons"
    if few.is_dir():
        return
    unfinished = work / ".few-icons"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    source = ASSETS / "icons-3d"
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    for name in FEW_ICONS:
        shutil.copy(source / name, unfinished)
    kept = [line for line in lines if json.loads(line)["file_name"] in FEW_ICONS]
    (unfinished / "metadata.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    unfinished.rename(few)


def train_missing(options: argparse.Namespace) -> None:
    """The command `train`."""
    arms = chosen_arms(options)
    prepare(options.folder, list(arms.values()))
    do(training(), options, arms)


def measure_missing(options: argparse.Namespace) -> None:
    """The command `measure`."""
    do(measuring(options.parts), options, chosen_arms(options))


def chosen_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """Name -> arm, of those that the user names.

    Raises:
        UserError: No arm has such a name, the folder cannot be written, or an arm has other settings than one
            of its finished runs.
    """
    arms = make_arms()
    for pattern in options.arms:
        if not fnmatch.filter(arms, pattern):
            raise UserError(f"--arms {pattern}: no arm is called so; there are {', '.join(arms)}")
    check_writable("--folder", options.folder)
    chosen = {name: arm for name, arm in arms.items() if any(fnmatch.fnmatch(name, p) for p in options.arms)}
    changes = [
        change_since(options.folder, name, arm, seed)
        for name, arm in chosen.items()
        for seed in range(options.seeds)
    ]
    if changed := list(filter(None, changes)):
        others = f" (and {len(changed) - 1} more such)" if len(changed) > 1 else ""
        raise UserError(
            f"--folder {options.folder}: {changed[0]}{others}; remove that run's folder or name another "
            "--folder"
        )
    return chosen


def do(job: Job, options: argparse.Namespace, arms: Iterable[str]) -> None:
    """Do a job for every run of some arms, by their names, that the user asks for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    tasks = [(name, seed) for name in arms for seed in range(options.seeds)]
    failed = run_all(job, options.folder, tasks, options.jobs)
    if failed:
        runs = ", ".join(f"{name} seed {seed}" for name, seed in failed)
        print(f"{len(failed)} of {len(tasks)} runs failed: {runs}", file=sys.stderr)
        sys.exit(1)


def write_tables(options: argparse.Namespace) -> None:
    """The command `report`.

    Raises:
        UserError: The folder has no runs.
    """
    arms = make_arms()
    if options.output:
        import_extra("matplotlib", "drawing plots")
        check_writable("--output", options.output.parent)
    text = report(options.folder, arms)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figures = write_figures(read_runs(options.folder, arms)[0], arms, options.output.parent)
        images = "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in figures)
        options.output.write_text(text + images, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Raises:
        UserError: Bad arguments.
    """
    parser = OneLineParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    trains = commands.add_parser("train", help="train what is missing")
    trains.set_defaults(command=train_missing)
    measures = commands.add_parser("measure", help="measure the finished runs")
    measures.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these (all)")
    measures.set_defaults(command=measure_missing)
    for working in (trains, measures):
        working.add_argument("--folder", type=Path, required=True, help="where runs go")
        working.add_argument("--seeds", type=positive, default=5, help="0 to this number less 1 (5)")
        working.add_argument("--jobs", type=positive, default=os.cpu_count(), help="at a time (the cores)")
        working.add_argument("--arms", nargs="+", default=["*"], help="names, or patterns of them (all)")
    reporting = commands.add_parser("report", help="make tables and plots of what was measured")
    reporting.add_argument("--folder", type=Path, required=True, help="where `train` left the runs")
    reporting.add_argument(
        "--output", type=Path, metavar="FILE.md", help="also write the tables here, with plots beside them"
    )
    reporting.set_defaults(command=write_tables)
    options = parser.parse_all(arguments)
    options.command(options)


if __name__ == "__main__":
    run_command(main)
