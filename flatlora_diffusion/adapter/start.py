"""An adapter file as the start of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor, nn

from flatlora_diffusion.adapter.file import adapter_tensors, find_file, read_facts
from flatlora_diffusion.adapter.layers import read_layers
from flatlora_diffusion.adapter.new_tokens import FACTS_KEY
from flatlora_diffusion.common.errors import UserError

_FLAG = "--lora_weights"


def read_start(
    path: Path,
    *,
    rank: int | None,
    scale: Callable[[int], float],
    dora: bool,
    parts: Collection[str],
    layers_per_block: int,
    widths: dict[str, int],
) -> dict[str, Tensor]:
    """The tensors of an adapter file from which a run with these settings can start.

    Args:
        path: A file in the format of diffusers, kohya or PEFT, or its folder.
        rank: Of every layer; None where they differ, so that `require_layers` compares them.
        scale: Rank of a layer -> the factor on B @ A.
        dora: Whether the layers have magnitudes.
        parts: Those of `unet`, `text_encoder` and `text_encoder_2` that are trained.
        layers_per_block: Of the UNet; SDXL has 2.
        widths: Features of both text encoders.

    Returns:
        The tensors under the names of `adapter_tensors`.

    Raises:
        UserError: The file isn't sound, or names the settings that differ.
    """
    file = find_file(path)
    if FACTS_KEY in read_facts(file):
        raise UserError(
            f"{_FLAG} {file}: trained together with new tokens, which can't be a start; give another"
        )
    adapter = read_layers(file, layers_per_block, widths)
    differences = []
    ranks = sorted({len(weights["down"]) for weights in adapter.weights.values()})
    if rank is not None and ranks != [rank]:
        differences.append(f"rank {', '.join(map(str, ranks))} there and {rank} here")
    scales = {(own, scale(len(adapter.weights[layer]["down"]))) for layer, own in adapter.scales.items()}
    other = [pair for pair in scales if not math.isclose(*pair, rel_tol=1e-6)]
    if other:
        there, here = (
            ", ".join(f"{factor:g}" for factor in sorted(set(own))) for own in zip(*other, strict=True)
        )
        differences.append(f"the update's scale (alpha / rank) {there} there and {here} here")
    with_dora = {"magnitude" in weights for weights in adapter.weights.values()}
    if with_dora != {dora}:
        differences.append("DoRA here and not there" if dora else "DoRA there and not here")
    met = {part for part, _ in adapter.weights}
    if met != set(parts):
        differences.append(f"it adapts {', '.join(sorted(met))}, and this run {', '.join(sorted(parts))}")
    if differences:
        flag = "--lora_layers (with its ranks)" if len(ranks) > 1 else "--rank"
        raise UserError(
            f"{_FLAG} {file}: doesn't fit this run ({'; '.join(differences)}); set {flag}, --lora_alpha, "
            "--use_dora and --train_text_encoder as it has them"
        )
    return adapter.to_diffusers()[0]


def require_layers(models: dict[str, nn.Module], tensors: dict[str, Tensor], path: str) -> None:
    """See that models with new adapters have just the layers of `read_start`.

    Raises:
        UserError: Names a layer that only one of them has, or has in another shape.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(tensor.shape) for name, tensor in adapter_tensors(models).items()}
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            met = f"{name} is {shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            raise UserError(f"{_FLAG} {path}: its layers aren't those of this run ({met}); set --lora_layers")
