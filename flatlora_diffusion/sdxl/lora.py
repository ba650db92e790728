"""The adapter on SDXL's models: names, targets, adding it, modes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from diffusers import (
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import nn

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import hash64

ADAPTER = "default"
FROZEN_ADAPTER = "initial"  # takes away the update that some initialisations start with; see initialise.py
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class Adaptable(Protocol):
    """A model of diffusers or of transformers, as far as adapters of PEFT go."""

    peft_config: dict[str, LoraConfig]

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str) -> None:
        """Put a fresh adapter on the layers that the configuration names, and make it the active one."""

    def set_adapter(self, adapter_name: list[str]) -> None:
        """Make these the active ones."""


def adaptable(model: nn.Module) -> Adaptable:
    """The model itself; its type says what adapters it has."""
    return cast(Adaptable, model)


@contextlib.contextmanager
def evaluating(models: Iterable[nn.Module]) -> Generator[None]:
    """Models as at inference: no noise, no dropout, no gradients; afterwards in the mode they were in."""
    modes = [(model, model.training) for model in models]
    for model, _ in modes:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in modes:
            model.train(training)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in the UNet or in a text encoder."""
    if isinstance(model, UNet2DConditionModel):
        model.enable_gradient_checkpointing()
    else:  # transformers has renamed it
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = getattr(model, next(name for name in names if hasattr(model, name)))
        enable({"use_reentrant": False})


def add_lora(
    models: dict[str, nn.Module],
    *,
    rank: int,
    alpha: float,
    seed: int,
    unet_targets: Sequence[str] = UNET_TARGETS,
    init_lora_weights: str | bool = "gaussian",
    **settings: Any,
) -> None:
    """Add a LoRA adapter with float32 parameters to the UNet and, where given, the text encoders.

    Args:
        models: `unet`, and `text_encoder` and `text_encoder_2` where they are trained.
        rank: Rank of every layer.
        alpha: The update is scaled by alpha / rank.
        seed: Decides the initial A (B is zero); the global RNG is left as it was.
        unet_targets: Ends of the names of the UNet's layers to adapt.
        init_lora_weights: How PEFT draws A: `gaussian`, or True for its default.
        settings: Further settings of PEFT's `LoraConfig`, such as `use_dora`.

    Raises:
        UserError: A name fits no layer.
    """
    for name, model in models.items():
        targets = unet_targets if name == "unet" else TEXT_ENCODER_TARGETS
        _check_targets(model, targets)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int and takes any number
            init_lora_weights=init_lora_weights,  # pyright: ignore[reportArgumentType]  # PEFT checks it
            target_modules=list(targets),
            **settings,
        )
        # PEFT draws from the global RNG. The model is on the CPU: adapters start the same on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash64(seed, "lora", name))
            adaptable(model).add_adapter(config, adapter_name=ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    adaptable = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in adaptable):
            known = sorted({name.rsplit(".", 1)[-1] for name in adaptable} - set("0123456789"))
            raise UserError(
                f"--lora_layers {target}: no linear or convolutional layer of the UNet is called so; "
                f"there are {', '.join(known)}"
            )
