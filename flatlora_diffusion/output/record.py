"""What a run says of itself: the settings that decide its result, facts in the adapter's file, a summary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, find_file, read_facts
from flatlora_diffusion.adapter.new_tokens import read_embeddings
from flatlora_diffusion.adapter.strength import file_digest
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.memory import peak_memory
from flatlora_diffusion.common.packages import LIBRARIES, package_versions
from flatlora_diffusion.config.layers import parse_layers
from flatlora_diffusion.config.settings import FLAT, TrainConfig
from flatlora_diffusion.sdxl.lora import ADAPTER, adaptable, is_pattern


def deciding_settings(
    config: TrainConfig, total_steps: int, data_digest: str, accelerator: Accelerator
) -> dict[str, Any]:
    """All that decides the adapter, by name: two runs that agree in it end in the same adapter."""
    deciding = {
        field.name
        for field in dataclasses.fields(config)
        if field.metadata["decides"]
        and not (field.metadata["later"] and getattr(config, field.name) == field.default)
    }
    settings = {name: value for name, value in config.settings().items() if name in deciding}
    settings |= {
        "lora_alpha": config.alpha,
        "mixed_precision": accelerator.mixed_precision,
        "images and captions": data_digest,
        "processes": accelerator.num_processes,
    }
    if config.has_own_ranks and config.lora_alpha is None:
        settings["lora_alpha"] = "the rank of each layer"
    if config.lora_weights is not None:
        settings["start of the LoRA"] = file_digest(find_file(Path(config.lora_weights)))
    noise_stretches = config.method == FLAT and config.flat_schedule != "constant"
    if noise_stretches or config.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = total_steps  # else a longer run may continue a shorter one
    text_encoder_steps = config.text_encoder_steps(total_steps)
    if text_encoder_steps < total_steps:
        settings["steps of the text encoders"] = text_encoder_steps
    return settings


def facts(
    config: TrainConfig,
    settings: dict[str, Any],
    trained: dict[str, nn.Module],
    step: int,
    averaged: bool = False,
) -> dict[str, Any]:
    """What the adapter's file says of its making: the same for every run that ends in the same adapter."""
    targets = {
        name: sorted(adaptable(model).peft_config[ADAPTER].target_modules or ())
        for name, model in trained.items()
    }
    if any(rank or is_pattern(name) for name, rank in parse_layers(config.lora_layers or ())):
        targets["unet"] = list(config.lora_layers or ())  # PEFT has another word for them, or a long list
    return {
        "method": config.method,
        "base": config.pretrained_model_name_or_path,
        "instance_prompt": config.instance_prompt,
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": targets,
        "init_lora_weights": config.init_lora_weights,
        "flat_sigma": config.flat_sigma,
        "flat_schedule": config.flat_schedule,
        "flat_noise": config.flat_noise,
        "ema_decay": config.ema_decay if averaged else None,
        "seed": config.seed,
        "steps": step,
        "settings_sha256": _digest(settings),
        "versions": _versions(config),
        **({"quantize_base": config.quantize_base} if config.quantize_base else {}),
        **({"caption_chunks": config.caption_chunks} if config.caption_chunks > 1 else {}),
    }


def is_complete(output: Path, settings: dict[str, Any], total_steps: int) -> bool:
    """Whether the folder holds the adapter that a run with these settings ends in."""
    weights = output / WEIGHTS_NAME
    if not weights.is_file():
        return False
    try:
        known = read_facts(weights)
        read_embeddings(weights, known)
    except UserError:  # damaged: it will be written again
        return False
    return known.get("steps") == total_steps and known.get("settings_sha256") == _digest(settings)


def summary(
    config: TrainConfig,
    accelerator: Accelerator,
    images: int,
    losses: Sequence[float],
    seconds: Sequence[float],
    heldout: dict[int, float],
    update_norms: Sequence[float],
) -> dict[str, Any]:
    """Settings, losses, time and memory of a finished run.

    Args:
        config: Its settings.
        accelerator: Tells the device and the number of processes.
        images: Number of training images.
        losses: Of every step since the first, also those before a resume.
        seconds: Of every step since the last resume.
        heldout: Step -> loss of the held-out images.
        update_norms: Frobenius norm of the saved adapter's update of each layer.
    """
    last_tenth = losses[-max(1, len(losses) // 10) :]
    on_gpu = accelerator.device.type == "cuda"
    return {
        "method": config.method,
        "settings": config.settings(),
        "images": images,
        "steps": len(losses),
        "mean_loss_of_last_tenth": sum(last_tenth) / len(last_tenth),
        "mean_update_norm": sum(update_norms) / len(update_norms),
        "median_seconds_a_step": statistics.median(seconds) if seconds else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "peak_memory_of": "GPU" if on_gpu else "process",
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": _versions(config),
        "losses": list(losses),
        "heldout_losses": heldout,
    }


def _versions(config: TrainConfig) -> dict[str, str]:
    """Versions of the packages that decide the result."""
    extra = ["bitsandbytes"] if config.quantize_base or config.use_8bit_adam else []
    known = package_versions(*LIBRARIES, "accelerate", *extra)
    return known | {"torch": torch.__version__}  # with its build, such as +cu128


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
