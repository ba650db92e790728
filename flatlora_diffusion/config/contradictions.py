"""Settings of a training run that don't go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flatlora_diffusion.common.errors import UserError

if TYPE_CHECKING:
    from flatlora_diffusion.config.settings import TrainConfig

FEWEST_MEASUREMENTS = 3
"""Of the held-out loss of folds: with fewer, one in the middle can't be the lowest."""


def reject_contradictions(config: TrainConfig) -> None:
    """Refuse settings that don't go together.

    Raises:
        UserError: Names the flags, and what to do.
    """
    start = f"--init_lora_weights {config.init_lora_weights}"
    if config.lora_weights is not None and config.init_lora_weights not in ("gaussian", "default"):
        raise UserError(
            f"--lora_weights with {start}: both say how the LoRA starts; leave out one of the two"
        )
    if config.use_dora and config.starts_with_update:
        raise UserError(
            f"--use_dora with {start}: DoRA and the frozen adapter that this adds have no single merged "
            "weight; leave out one of the two"
        )
    if config.scale_weight_norms and (config.use_dora or config.starts_with_update):
        other = "--use_dora" if config.use_dora else start
        raise UserError(
            f"--scale_weight_norms with {other}: its update isn't s*B@A, so scaling A and B doesn't "
            "scale it; leave out one of the two"
        )
    if config.aspect_buckets and config.resolution % 8:
        raise UserError(
            f"--aspect_buckets with --resolution {config.resolution}: the sides of buckets are multiples "
            "of 8; give a resolution that is one too"
        )
    if config.optimizer == "prodigy" and config.loraplus_lr_ratio:
        raise UserError("--loraplus_lr_ratio: Prodigy has one learning rate for all; use adamw")
    if not config.instance_data_dir and not config.dataset_name:
        raise UserError("give --instance_data_dir or --dataset_name: one of them says where the images are")
    if config.instance_data_dir and config.dataset_name:
        raise UserError("--instance_data_dir and --dataset_name: give only one of them")
    if config.heldout_split and config.heldout_data_dir:
        raise UserError("--heldout_data_dir and --heldout_split: give only one of them")
    if config.heldout_split and not config.dataset_name:
        raise UserError("--heldout_split is for --dataset_name; for a folder give --heldout_data_dir")
    if config.folds:
        _reject_with_folds(config)
    if config.stop_when_worse and not (config.heldout_data_dir or config.heldout_split):
        raise UserError("--stop_when_worse needs held-out images; give --heldout_data_dir or --heldout_split")
    if config.heldout_split == "train":
        raise UserError("--heldout_split train: that split is trained; give another one")
    if config.keep_tokens and not config.shuffle_caption:
        raise UserError("--keep_tokens is for --shuffle_caption; leave it out, or give both")
    if config.alpha_background_weight and not config.alpha_mask:
        raise UserError("--alpha_background_weight is for --alpha_mask; leave it out, or give both")
    if config.quantize_base == "8bit" and config.use_dora:
        raise UserError("--use_dora: PEFT has no DoRA on 8 bits that works on every device; use 4bit")
    for name in ("class_data_dir", "class_prompt"):
        if config.with_prior_preservation and getattr(config, name) is None:
            raise UserError(f"--with_prior_preservation needs --{name}")
    if config.train_text_encoder and config.train_text_encoder_ti:
        raise UserError(
            "--train_text_encoder and --train_text_encoder_ti: give one of them; the first trains LoRA "
            "layers in the text encoders, the second new tokens"
        )
    if config.use_ema and config.train_text_encoder and config.train_text_encoder_frac < 1:
        raise UserError(
            "--use_ema with --train_text_encoder_frac below 1: the average of the text encoders would go "
            "on changing; leave one of them out"
        )
    words = config.abstractions
    if not all(words) or len(set(words)) != len(words):
        raise UserError(
            f"--token_abstraction {config.token_abstraction}: must be one word, or different ones with "
            "commas between them"
        )
    if config.hub_token is not None and config.report_to in ("wandb", "all"):
        raise UserError(
            f"--hub_token with --report_to {config.report_to}: wandb records the command line and would "
            "expose the token; log in with `hf auth login` and leave --hub_token out"
        )
    if config.compare and not config.flat_sigma:
        raise UserError(
            "--compare with --flat_sigma 0 would train plain LoRA twice; give a sigma such as 0.1"
        )


def _reject_with_folds(config: TrainConfig) -> None:
    """Refuse what doesn't go together with --folds."""
    for name in ("heldout_data_dir", "heldout_split"):
        if getattr(config, name):
            raise UserError(f"--folds with --{name}: both say what is held out; leave out one of the two")
    if config.stop_when_worse:
        raise UserError(
            "--folds with --stop_when_worse: the mean needs curves of one length; leave out one of the two"
        )
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UserError(
            f"--folds with --resume_from_checkpoint {config.resume_from_checkpoint}: every fold has "
            "checkpoints of its own; give latest"
        )
    if config.max_train_steps:
        require_curve(config.max_train_steps, config.heldout_steps)


def require_curve(total_steps: int, every: int) -> None:
    """Refuse folds whose held-out loss would be measured too seldom to see where it is lowest.

    Args:
        total_steps: Of each fold.
        every: So many steps it is measured, and at the end.

    Raises:
        UserError: Names the flag, and what to give.
    """
    count = math.ceil(total_steps / every)
    if count < FEWEST_MEASUREMENTS:
        advice = f"give --heldout_steps {total_steps // 10 or 1}"
        raise UserError(
            f"--folds with --heldout_steps {every}: in {total_steps} steps the held-out loss would be "
            f"measured {count} time{'s' * (count > 1)}, too seldom to see where it is lowest; "
            f"{advice if total_steps >= FEWEST_MEASUREMENTS else 'train for longer'}"
        )
