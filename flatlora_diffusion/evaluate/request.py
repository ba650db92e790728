"""What the flags of an evaluation ask for: a plan; and what measuring it writes."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.adapter.mix import Source
from flatlora_diffusion.adapter.strength import Strength, write_strength
from flatlora_diffusion.common.devices import checked_device
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.lock import check_writable, output_lock
from flatlora_diffusion.common.processes import ALONE, Processes
from flatlora_diffusion.data.images import PROMPT_PLACEHOLDER, Sample, find_samples
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.evaluate.evaluation import Evaluation
from flatlora_diffusion.evaluate.plan import Plan
from flatlora_diffusion.evaluate.plots import write_plots
from flatlora_diffusion.evaluate.tables import markdown
from flatlora_diffusion.output.noted import note_in_cards

logger = logging.getLogger(__name__)

TABLES = "evaluation.md"


def evaluate(
    plan: Plan, folder: Path, *, write_scale: bool = False, processes: Processes = ALONE
) -> dict[str, Any]:
    """Measure a plan; write `evaluation.json`, `evaluation.md` and the plots into a folder.

    An evaluation that was stopped goes on where it was; what was measured in the same way is kept.

    Args:
        plan: What.
        folder: Where the results go.
        write_scale: Note the recommended scale in each adapter's file and model card.
        processes: Share out the work; each calls this `together`. The main process alone writes the report.

    Returns:
        The report: see `evaluate.report`.

    Raises:
        UserError: Something is missing, damaged, or doesn't fit; nothing has been written.
    """
    import_extra("matplotlib", "drawing plots")  # before hours of measuring, not after them
    check_writable("--output", folder)
    evaluation = Evaluation(plan, folder, processes)
    with output_lock(folder, "--output") if processes.is_main else contextlib.nullcontext():
        report = evaluation.run()
        if not processes.is_main:
            return report
        paths = write_plots(report, folder)
        images = "".join(f"\n![{path.stem}]({path.name})\n" for path in paths)
        write_atomically(folder / TABLES, (markdown(report) + images).encode())
    if write_scale:
        for label, name in evaluation.names.items():
            recommended = report["methods"][label].get("recommended")
            if name is not None and recommended:
                _note_scale(label, evaluation.facts[name], Strength(**recommended))
    return report


def _note_scale(label: str, adapter: AdapterFacts, strength: Strength) -> None:
    """Note the recommended scale in an adapter's file and in the model cards that tell of it; say where."""
    if adapter.mix:
        logger.info("%s: several files have no scale of their own; none is noted", label)
    elif not write_strength(adapter.file, strength):
        logger.info("%s: %s is of another program and stays as it is; no scale is noted", label, adapter.file)
    else:
        places = [adapter.file, *note_in_cards(adapter.file)]
        logger.info("%s: the recommended scale is noted in %s", label, " and ".join(map(str, places)))


def read_plan(given: dict[str, Any]) -> Plan:
    """The evaluation that the flags ask for.

    Args:
        given: Flag without its dashes -> value, for each that was given.

    Raises:
        UserError: Names what is missing, wrong or too much.
    """
    if "retention" in given and "prompt" in given:
        raise UserError("--retention and --prompt: give only one of them")
    if "prompt" in given and "clip" not in given:
        raise UserError("--prompt needs --clip: it asks for pictures, which a CLIP compares")
    adapters: dict[str, Source] = {}
    for label, path in given["adapter"]:
        if label == BASE:
            raise UserError(f"--adapter {label}={path}: the base itself is called so; give it another name")
        if label in adapters:
            raise UserError(
                f"--adapter {label}={path}: {label} is {adapters[label]} already; give another name"
            )
        adapters[label] = path
    for flag in ("resolution", "steps", "caption_chunks"):
        if flag in given and (given[flag] < 1 or (flag == "resolution" and given[flag] % 8)):
            what = "a multiple of 8" if flag == "resolution" else "1 or more"
            raise UserError(f"--{flag} {given[flag]}: must be {what}")
    samples = {
        flag: _samples(flag, given[flag], given.get("instance_prompt"), given.get("kohya_folders", False))
        for flag in ("heldout", "training", "retention")
        if flag in given
    }
    names = ("clip", "resolution", "steps", "guidance", "caption_chunks", "parts", "dtype")
    return Plan(
        base=given["base"],
        adapters=adapters,
        prompts=given.get("prompt", ()),
        device=checked_device(given.get("device")),
        **samples,
        **{name: given[name] for name in names if name in given},
    )


def _samples(flag: str, folder: Path, instance_prompt: str | None, kohya_folders: bool) -> list[Sample]:
    prompt = instance_prompt or PROMPT_PLACEHOLDER
    samples = find_samples(folder, prompt, f"--{flag} {folder}", kohya_folders=kohya_folders)
    for sample in samples:
        if PROMPT_PLACEHOLDER in sample.caption:
            raise UserError(f"--{flag} {folder}: {sample.path.name} has no caption; give --instance_prompt")
    return samples
