"""The optimizer of the adapters: AdamW, 8-bit AdamW or Prodigy, with the learning rate that each part has."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.config.settings import TrainConfig

logger = logging.getLogger(__name__)

LOW_FOR_PRODIGY = 0.1  # Prodigy finds the size of its steps itself; its learning rate is a factor near 1


def parameter_groups(
    trained: dict[str, nn.Module], config: TrainConfig, lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """What is trained, by learning rate and weight decay: adapters and embeddings of new tokens.

    LoRA+ (arXiv 2402.12354) gives each B a learning rate `loraplus_lr_ratio` times that of its A.

    Args:
        trained: `unet`, and `text_encoder` and `text_encoder_2` where they are trained.
        config: Learning rates and weight decays.
        lr_factor: Multiplies `learning_rate`, and as in the diffusers script not the text encoders' own.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and the name of their `part`.
    """
    rates = {
        "unet": lr_factor * config.learning_rate,
        "text_encoder": config.text_encoder_lr,
        "text_encoder_2": config.second_text_encoder_lr,
    }
    if config.optimizer == "prodigy":  # it has one learning rate for all
        rates = dict.fromkeys(rates, rates["unet"])
    groups = []
    for part, model in trained.items():
        decay = config.adam_weight_decay if part == "unet" else config.adam_weight_decay_text_encoder
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        ratio = config.loraplus_lr_ratio or 1.0
        fast = [p for name, p in named if ratio != 1 and "lora_B" in name]
        slow = [p for name, p in named if ratio == 1 or "lora_B" not in name]
        for parameters, factor in ((slow, 1.0), (fast, ratio)):
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": factor * rates[part],
                        "weight_decay": decay,
                        "part": part,
                    }
                )
    return groups


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names.

    Raises:
        UserError: Its package is not installed.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamw":
        kind = torch.optim.AdamW
        if config.use_8bit_adam:
            kind = import_extra("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit
        return kind(groups, betas=betas, eps=config.adam_epsilon)
    if config.learning_rate <= LOW_FOR_PRODIGY:
        logger.warning("Prodigy's learning rate is a factor: 1.0 is usual, %g is low", config.learning_rate)
    return import_extra("prodigyopt", "--optimizer prodigy").Prodigy(
        groups,
        betas=betas,
        beta3=config.prodigy_beta3,
        eps=config.adam_epsilon,
        decouple=config.prodigy_decouple,
        use_bias_correction=config.prodigy_use_bias_correction,
        safeguard_warmup=config.prodigy_safeguard_warmup,
    )
