"""The adapter on SDXL's models: names, targets, adding it, modes."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
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

Target = tuple[str, int | None]
"""The end of a name, or a pattern of ends with `*`, `?` or `[...]`, and the rank of such layers if given."""

_NEAR = 3  # names told where a pattern fits none


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
    alpha: float | None,
    seed: int,
    unet_targets: Sequence[str | Target] = UNET_TARGETS,
    init_lora_weights: str | bool = "gaussian",
    **settings: Any,
) -> None:
    """Add a LoRA adapter with float32 parameters to the UNet and, where given, the text encoders.

    Args:
        models: `unet`, and `text_encoder` and `text_encoder_2` where they are trained.
        rank: Rank of every layer that has none of its own.
        alpha: The update of a layer is scaled by alpha / its rank; None: alpha is the rank of each.
        seed: Decides the initial A (B is zero); the global RNG is left as it was.
        unet_targets: Ends of the names of the UNet's layers to adapt, or patterns of them, with ranks.
        init_lora_weights: How PEFT draws A: `gaussian`, or True for its default.
        settings: Further settings of PEFT's `LoraConfig`, such as `use_dora`.

    Raises:
        UserError: A name fits no layer.
    """
    for name, model in models.items():
        words = unet_targets if name == "unet" else TEXT_ENCODER_TARGETS
        targets = [(word, None) if isinstance(word, str) else word for word in words]
        config = LoraConfig(
            init_lora_weights=init_lora_weights,  # pyright: ignore[reportArgumentType]  # PEFT checks it
            **peft_settings(targets, select(model, targets), rank, alpha),
            **settings,
        )
        # PEFT draws from the global RNG. The model is on the CPU: adapters start the same on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash64(seed, "lora", name))
            adaptable(model).add_adapter(config, adapter_name=ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def select(model: nn.Module, targets: Iterable[Target]) -> dict[str, int | None]:
    """The layers that targets name, and their ranks.

    Args:
        model: Its linear and convolutional layers can be named.
        targets: Of those that fit a layer and have a rank, the last one gives it its rank.

    Returns:
        Name of the layer -> its rank, or None where it has that of all others; in the model's order.

    Raises:
        UserError: A target fits no layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    found: dict[str, int | None] = {}
    for target, rank in targets:
        end = re.compile(rf"(?:.*\.)?{fnmatch.translate(target)}")
        fitting = [name for name in names if end.match(name)]
        if not fitting:
            raise UserError(
                f"--lora_layers {target}: no linear or convolutional layer of the UNet is called so; "
                f"{_there_are(target, names)}"
            )
        for name in fitting:
            found[name] = found.get(name) if rank is None else rank
    return {name: found[name] for name in names if name in found}


def peft_settings(
    targets: Sequence[Target], layers: Mapping[str, int | None], rank: int, alpha: float | None
) -> dict[str, Any]:
    """What PEFT's `LoraConfig` says of layers, ranks and alphas.

    Args:
        targets: As `select` takes them.
        layers: What it gave.
        rank: Of layers without one of their own.
        alpha: Of all layers, whose update is scaled by alpha / their rank; None: the rank of each.
    """
    by_rank: dict[int, list[str]] = {}
    for name, own in layers.items():
        if own is not None and own != rank:
            by_rank.setdefault(own, []).append(re.escape(name))
    # One expression a rank, of whole names: which one comes first must not matter, files sort them.
    ranks = {f"(?:{'|'.join(names)})": own for own, names in by_rank.items()}
    plain = not any(is_pattern(target) for target, _ in targets)
    return {
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": [target for target, _ in targets] if plain else list(layers),
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks) if alpha is None else {},
    }


def is_pattern(target: str) -> bool:
    """Whether it stands for several names, and not for an end of names alone."""
    return any(character in target for character in "*?[")


def _there_are(target: str, names: Iterable[str]) -> str:
    """Names that a target may have meant."""
    if not is_pattern(target) and "." not in target:
        return (
            f"there are {', '.join(sorted({name.rsplit('.', 1)[-1] for name in names} - set('0123456789')))}"
        )
    paths = [name.split(".") for name in names]
    starts = {".".join(path[:length]) for path in paths for length in range(1, len(path) + 1)}
    ends = {".".join(path[-length:]) for path in paths for length in range(1, len(path) + 1)}
    if not is_pattern(target):
        near = difflib.get_close_matches(target, sorted(ends), n=_NEAR, cutoff=0.5)
    else:
        parts = sorted(starts - set(names))  # what has layers inside it
        near = [f"{part}.*" for part in difflib.get_close_matches(target.rstrip(".*"), parts, _NEAR, 0.5)]
    blocks = (f"{path[0]}.*" for path in paths if len(path) > 1)
    return f"near it are {', '.join(near)}" if near else f"there are {', '.join(dict.fromkeys(blocks))}"
