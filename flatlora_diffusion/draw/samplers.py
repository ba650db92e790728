"""Samplers by the names that users know, and what they think the finished picture is at each step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from torch import Tensor

DEFAULT = "default"  # the base's own

# By the names of classes of diffusers: command lines list the samplers before anything slow is imported. A
# scheduler is called by the first that fits it. The trainer's flag has a list of its own:
# `config/settings.py::VALIDATION_SAMPLERS`.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}

SAMPLERS = (DEFAULT, *_KINDS)


def sampler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """A fresh scheduler, which shares no state with others.

    Args:
        name: One of `SAMPLERS`.
        own: The base's scheduler, whose noise levels and kind of prediction it takes over.

    Raises:
        ValueError: There is no such sampler.
    """
    import diffusers

    assert isinstance(own, diffusers.ConfigMixin), "all schedulers have a configuration"
    if name == DEFAULT:
        fresh = type(own).from_config(own.config)
    elif name in _KINDS:
        kind, settings = _KINDS[name]
        fresh = getattr(diffusers, kind).from_config(own.config, **settings)
    else:
        raise ValueError(f"sampler {name!r}: must be one of {', '.join(SAMPLERS)}")
    assert isinstance(fresh, diffusers.SchedulerMixin)
    return fresh


def scheduler_of(name: str) -> tuple[str, dict[str, Any]] | None:
    """The class of diffusers and its settings that a sampler stands for; None for the base's own."""
    return _KINDS.get(name)


def sampler_name(name: str, own: SchedulerMixin) -> str:
    """The name that A1111 has for a sampler, or the class of a base's own that has none."""
    if name != DEFAULT:
        return name
    import diffusers

    assert isinstance(own, diffusers.ConfigMixin), "all schedulers have a configuration"
    for known, (kind, settings) in _KINDS.items():
        is_that = type(own) is getattr(diffusers, kind)
        if is_that and all(own.config.get(key) == value for key, value in settings.items()):
            return known
    return type(own).__name__.removesuffix("Scheduler")


def tell_predictions(scheduler: SchedulerMixin, listener: Callable[[Tensor], None]) -> None:
    """Let a scheduler tell at each step which noiseless latents it expects; its results stay the same.

    Schedulers that keep no such prediction tell the latents as they are.

    Args:
        scheduler: Changed in place.
        listener: Gets the latents (N, channels, height, width).
    """
    # Every scheduler has it, though their common class doesn't say so.
    step = scheduler.step  # pyright: ignore[reportAttributeAccessIssue]

    @functools.wraps(step)  # pipelines look at its parameters
    def telling(*arguments: Any, return_dict: bool = True, **settings: Any) -> Any:
        output = step(*arguments, **settings, return_dict=True)
        prediction = getattr(output, "pred_original_sample", None)
        if prediction is None:  # multistep solvers keep their predictions for the next steps
            prediction = getattr(scheduler, "model_outputs", [output.prev_sample])[-1]
        listener(prediction)
        return output if return_dict else (output.prev_sample,)

    scheduler.step = telling  # pyright: ignore[reportAttributeAccessIssue]
