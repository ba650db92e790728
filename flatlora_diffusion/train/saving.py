"""What a run saves at its end: the adapter, its other forms, the summary."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.output.names import BEST, KOHYA_NAME, LIVE_HELDOUT, SUMMARY
from flatlora_diffusion.output.record import summary

if TYPE_CHECKING:
    from flatlora_diffusion.train.loop import Run

logger = logging.getLogger(__name__)


def save(run: Run, last: int) -> None:
    """Save the adapter of the last step before anything else that could fail, then the summary.

    Args:
        run: In all its processes, of which the main one writes.
        last: The last step; an earlier one than planned where --stop_when_worse has ended the run.

    Raises:
        UserError: The disk is full or not writable.
    """
    if run.accelerator.is_main_process:
        adapter, others = run.state.files(last)
        # The adapter comes last: its file says that the run is complete.
        for name, content in others.items():
            write_atomically(run.output / name, content)
        write_atomically(run.output / WEIGHTS_NAME, adapter)
        if run.config.output_kohya_format:
            layers = run.learner.base.unet.config["layers_per_block"]
            convert(run.output / WEIGHTS_NAME, run.output / KOHYA_NAME, layers)
        with run.state.averaged():
            norms = run.state.norms.measure().tolist()
        if not any(norms) and not run.config.use_dora:  # a DoRA also has magnitudes
            logger.warning("the adapter has no effect: every update B@A is exactly 0; raise --learning_rate")
        report = summary(
            run.config,
            run.accelerator,
            len(run.samples),
            run.state.losses,
            run.seconds,
            run.state.heldout_losses,
            norms,
        )
        best = run.state.best.write(run.output, last)
        report |= {"best": best} if best else {}
        report |= {LIVE_HELDOUT: run.state.live_losses} if run.state.live_losses else {}
        report |= {"folds": run.found.summary()} if run.found else {}
        if last < run.last_step:
            report["stopped_when_worse"] = True
            logger.info("stopped after step %d of %d: --stop_when_worse", last, run.total_steps)
        if run.state.changes:
            report["changes"] = run.state.changes
        if run.state.skipped:
            report["skipped_steps"] = run.state.skipped
        write_atomically(run.output / SUMMARY, json.dumps(report, indent=2).encode())
        if best and best["step"] != last and not run.label:
            told = (best["step"], best["heldout_loss"], run.output / BEST)
            logger.info("the held-out loss was lowest after step %d (%.4g): that adapter is in %s", *told)
        if not run.label:  # a fold's adapter is not what was wanted
            _tell_saved(run)
    run.accelerator.wait_for_everyone()


def _tell_saved(run: Run) -> None:
    saved = run.output / WEIGHTS_NAME
    logger.info("saved %s: for diffusers, and the app, grids and evaluation here", saved)
    if run.config.output_kohya_format:
        logger.info("saved %s: for ComfyUI, A1111 and sd-scripts", run.output / KOHYA_NAME)
    else:
        logger.info(
            "ComfyUI, A1111 and sd-scripts need it converted: flatlora-kohya %s NEW.safetensors", saved
        )
