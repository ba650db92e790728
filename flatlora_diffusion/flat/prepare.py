"""What a step prepares, for all layers at once: row norms, standard deviations and draws.

Layers of one shape share each operation, so that a step costs a few hundred small operations less than one
that goes from layer to layer; a layer's forward pass then only looks its draw up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.common.seeds import hash64
from flatlora_diffusion.flat.layer import Contents, PerturbedLayer
from flatlora_diffusion.flat.noise import NoiseSource
from flatlora_diffusion.flat.row_norms import merged_row_norms


class _Kind(NamedTuple):
    """Layers of one kind are computed together."""

    a: torch.Size
    b: torch.Size
    factors: torch.dtype
    scaling: float
    noise: torch.dtype
    device: torch.device


class _Member(NamedTuple):
    """A layer with the factors of its update."""

    layer: PerturbedLayer
    contents: Contents
    a: Tensor
    b: Tensor


@torch.no_grad()
def prepare(
    layers: Iterable[tuple[PerturbedLayer, Contents]],
    moment: object,
    sigma: float,
    source: NoiseSource,
    key: Sequence[object],
) -> None:
    """Give each layer its row norms and its draw: `sigma / sqrt(n) * ||W'_i||` on row i (equation 7).

    Args:
        layers: Those to prepare, with their contents.
        moment: The step for which it holds (see `Prepared`).
        sigma: Strength of the noise at this step.
        source: Draws the noise, from a hash of `key` and the layer's name.
        key: Seed, step and rank.

    Raises:
        ValueError: DoRA is active together with other adapters.
    """
    kinds: dict[_Kind, list[_Member]] = {}
    for layer, contents in layers:
        a, b, scaling = layer.low_rank(contents)
        kind = _Kind(a.shape, b.shape, a.dtype, scaling, layer.noise_dtype, a.device)
        kinds.setdefault(kind, []).append(_Member(layer, contents, a, b))
    for kind, members in kinds.items():
        with torch.autocast(kind.device.type, enabled=False):
            norms = merged_row_norms(
                (member.layer.weight.flatten(1) for member in members),  # one dequantised weight at a time
                torch.stack([member.layer.weight_norms_squared() for member in members]),
                torch.stack([member.a for member in members]).float().flatten(2),
                torch.stack([member.b for member in members]).float().flatten(2).mul_(kind.scaling),
            )
            inputs = kind.a[1:].numel()
            row_std = (norms * (sigma / inputs**0.5)).to(kind.noise)
        keys = [hash64(*key, member.layer.name) for member in members]
        draws = source.draws(keys, row_std, inputs)
        for member, row_norms, draw in zip(members, norms.unbind(), draws, strict=True):
            member.layer.prepare(moment, member.contents, row_norms, draw)
