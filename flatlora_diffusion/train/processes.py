"""The processes of a run: one, or several that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from flatlora_diffusion.common.errors import ToldElsewhereError, UserError
from flatlora_diffusion.common.processes import PATIENCE
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train.tracking import usable_tracker

logger = logging.getLogger(__name__)

Produced = TypeVar("Produced")

_PREFIX = "ACCELERATE_"
_WHOLE_ROWS = "weights among processes, and Flat-LoRA's noise needs whole rows of them"
_REFUSED = {  # what `accelerate launch` sets: what it is, and why it isn't for this
    "USE_DEEPSPEED": f"DeepSpeed splits optimizer states or {_WHOLE_ROWS}",
    "USE_FSDP": f"FSDP splits {_WHOLE_ROWS}",
    "USE_MEGATRON_LM": f"Megatron-LM splits {_WHOLE_ROWS}",
    "USE_PARALLELISM_CONFIG": f"tensor, context or sequence parallelism splits {_WHOLE_ROWS}",
}


def join_processes() -> PartialState:
    """Meet the other processes of this run, if there are any; they then wait for each other up to a day.

    Raises:
        UserError: The run was launched in a way that cannot train.
    """
    _refuse_sharding()
    # Without an accelerator accelerate would leave several processes strangers to each other.
    on_cpu = parse_flag_from_env(f"{_PREFIX}USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    if state.distributed_type == DistributedType.XLA:
        raise UserError("TPUs (XLA) are not supported; train on GPUs")
    return state


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this process: device, precision, trackers.

    Raises:
        UserError: As `join_processes`; or the tracker is unknown, or the device lacks the precision.
    """
    join_processes()
    tracker = usable_tracker(config.report_to)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
            ),
        )
    except (ValueError, ImportError) as error:  # a precision that the device lacks
        raise UserError(f"accelerate refuses these settings: {' '.join(str(error).split())}") from error
    steps = config.gradient_accumulation_steps
    if accelerator.gradient_accumulation_steps not in (1, steps):  # the launcher's replace those of a script
        logger.warning(
            "the launcher's gradient_accumulation_steps %d is passed over: the script's is %d",
            accelerator.gradient_accumulation_steps,
            steps,
        )
    accelerator.gradient_accumulation_steps = steps
    return accelerator


def from_main(produce: Callable[[], Produced]) -> Produced:
    """What the main process makes, on every process; its `UserError` ends every process, and is told once."""
    outcome: list[Any] = [None]
    is_main = PartialState().is_main_process
    if is_main:
        try:
            outcome = [produce()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0] if is_main else ToldElsewhereError(str(outcome[0]))
    return outcome[0]


def require_same(settings: dict[str, Any]) -> None:
    """Refuse processes that would train something else: other images on another machine, say.

    Raises:
        UserError: Names the process and the settings, on every process.
    """
    first, *others = gather_object([settings])
    for rank, other in enumerate(others, start=1):
        different = [name for name in first if other.get(name) != first[name]]
        if different:
            raise UserError(
                f"process {rank} has another {', another '.join(different)} than process 0: every machine "
                "needs the same folders and the same command"
            )


def leave_processes() -> None:
    """Part from the other processes, when all have come so far."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def _refuse_sharding() -> None:
    for name, reason in _REFUSED.items():
        if parse_flag_from_env(_PREFIX + name):
            raise UserError(
                f"{reason}; what is trained is small, so use data parallelism (assets/accelerate/ddp.yaml)"
            )
