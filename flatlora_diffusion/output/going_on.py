"""Going on from a checkpoint with other settings than it has: which may differ, and what that means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flatlora_diffusion.common.errors import UserError

BINDING = frozenset(
    (
        # The base, from which the adapter was trained.
        *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant"),
        "quantize_base",
        # The adapter, and how it began.
        *("rank", "lora_alpha", "use_dora", "use_rslora", "lora_layers", "init_lora_weights"),
        *("start of the LoRA", "use_ema", "train_text_encoder", "train_text_encoder_ti"),
        *("token_abstraction", "num_new_tokens_per_abstraction"),
        # What the optimizer's state is of.
        *("optimizer", "use_8bit_adam", "loraplus_lr_ratio"),
        # Another subject, for all that can be known.
        "images and captions",
    )
)
"""Settings with which a run has begun and must end: another value would make the result mean nothing."""

_ORDER = {"train_batch_size", "gradient_accumulation_steps", "processes", "seed", "aspect_buckets"}
_SHOWN = 3  # of the settings that are refused

Differences = dict[str, tuple[Any, Any]]
"""Settings by name: what they were, and what they are."""


def differences(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> Differences:
    """What a checkpoint's settings and the present ones differ in, where a run can go on all the same.

    Args:
        folder: Of the checkpoint, for errors.
        then: Its settings.
        now: Those of the run.

    Raises:
        UserError: One of those that must stay differs, or noise would begin or end.
    """
    now = json.loads(json.dumps(now))  # tuples become lists, as they did when they were written
    names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    found = {name: (then.get(name), now.get(name)) for name in names}
    refused = {name: values for name, values in found.items() if _is_binding(name, values)}
    if refused:
        shown = ", ".join(in_words(dict(list(refused.items())[:_SHOWN])))
        raise UserError(
            f"{folder} belongs to other settings ({shown}{', ...' if len(refused) > _SHOWN else ''}); "
            "resume with those, or give another --output_dir"
        )
    return found


def _is_binding(name: str, values: tuple[Any, Any]) -> bool:
    """A run with noise in one part alone would be neither LoRA nor Flat-LoRA."""
    return name in BINDING or (name == "flat_sigma" and bool(values[0]) != bool(values[1]))


def in_words(found: Differences) -> list[str]:
    """Each difference as `NAME THEN then and NOW now`."""
    return [f"{name} {then!r} then and {now!r} now" for name, (then, now) in found.items()]


def consequences(
    found: Differences, *, sigma: tuple[float, float], rate: tuple[float, float], total_steps: int
) -> list[str]:
    """What the differences mean for the steps that follow, in words.

    Args:
        found: The differences.
        sigma: Strength of the noise in the next step, by the settings of then and of now.
        rate: Learning rate in the next step, the same.
        total_steps: Of the run as it is now.
    """
    told = []
    for what, (then, now) in (("sigma", sigma), ("the learning rate", rate)):
        if then != now:
            told.append(
                f"{what} follows its schedule over {total_steps} steps, so it goes on at {now:.3g} where it "
                f"would have been {then:.3g}"
            )
    if _ORDER & found.keys():
        told.append("the images come in another order from here on")
    return told


def require_steps_left(
    folder: Path, done: int, found: Differences, total_steps: int, *, best_of_folds: int | None = None
) -> None:
    """Refuse a checkpoint from which there is no way to the end that the present settings ask for.

    Args:
        folder: Of the checkpoint, for errors.
        done: Its steps.
        found: The differences.
        total_steps: Of the run as it is now.
        best_of_folds: The steps that folds have found, after which the run ends.

    Raises:
        UserError: Says how many steps it has, and what to do.
    """
    differ = ", ".join(in_words(found))
    if best_of_folds and (done > best_of_folds or (done == best_of_folds and differ)):
        other = f", with other settings ({differ})" if differ else ""
        raise UserError(
            f"{folder} has {done} steps{other}, and the folds have found {best_of_folds}; give "
            "another --output_dir"
        )
    if done > total_steps:
        raise UserError(
            f"{folder} has {done} steps, more than the {total_steps} of this run; give a "
            "larger --max_train_steps, or the name of an earlier checkpoint"
        )
    if done == total_steps and differ:
        raise UserError(
            f"{folder} has all {done} steps done with other settings ({differ}); give a larger "
            "--max_train_steps to go on with these"
        )
