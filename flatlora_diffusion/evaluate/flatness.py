"""How flat the loss is around merged weights: under noise, along random directions, and at its sharpest.

All take a merged UNet (`merged.merged_unet`) and a loss of it. Random numbers depend on (seed, draw, layer)
alone: the same ones meet every adapter, so that differences between adapters are not those of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.evaluate.merged import filter_norms, replaced

Loss = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Rise:
    """What noise of strength sigma does to the loss.

    Attributes:
        sigma: Strength of the noise, relative to each filter.
        rise: Mean loss with noise minus the loss without.
        standard_error: Of that mean, over the draws.
    """

    sigma: float
    rise: float
    standard_error: float


def expected_rise(
    loss: Loss, unet: nn.Module, layers: Sequence[str], sigmas: Sequence[float], draws: int, seed: int = 0
) -> list[Rise]:
    """`E_eps[L(W' + eps)] - L(W')`, the noise being that of Flat-LoRA (arXiv 2409.14396, equation 7).

    Every draw of the noise is used with both signs, which takes the first-order part of the loss out of the
    estimate; all sigmas see the same draws.

    Args:
        loss: The loss of a UNet; called `2 * draws` times for each sigma, and once.
        unet: With merged weights W'.
        layers: Names of the layers that are perturbed.
        sigmas: Strengths.
        draws: Pairs of draws, at least 2.
        seed: Of the draws.

    Returns:
        A rise for each sigma; not finite where the loss isn't.

    Raises:
        ValueError: There are no layers.
    """
    if not layers:
        raise ValueError("no layers to perturb")
    quiet = loss(unet)
    differences: dict[float, list[float]] = {sigma: [] for sigma in sigmas}
    for draw in range(draws):
        noise = {name: _noise(unet, name, seed, draw) for name in layers}  # slow to draw on large models
        for sigma in sigmas:
            both = [_loss_at(loss, unet, [(sign * sigma, noise)]) - quiet for sign in (1, -1)]
            differences[sigma].append(sum(both) / 2)
    rises = []
    for sigma, found in differences.items():
        values = torch.tensor(found, dtype=torch.float64)
        rises.append(Rise(sigma, values.mean().item(), values.std().item() / math.sqrt(draws)))
    return rises


def landscape_line(
    loss: Loss,
    unet: nn.Module,
    layers: Sequence[str],
    alphas: Sequence[float],
    directions: int,
    seed: int = 0,
) -> list[list[float]]:
    """Losses `L(W' + alpha * d)` along random filter-normalised directions (arXiv 1712.09913, section 4).

    Args:
        loss: The loss of a UNet.
        unet: With merged weights W'.
        layers: Names of the layers that are moved: for the full weight space `merged.filters`.
        alphas: How far; at 1 every filter has moved by its own norm.
        directions: How many.
        seed: Of the directions.

    Returns:
        For each direction the losses, one an alpha.
    """
    lines = []
    for index in range(directions):
        direction = _direction(unet, layers, seed, index)
        lines.append([_loss_at(loss, unet, [(alpha, direction)]) for alpha in alphas])
    return lines


def landscape_plane(
    loss: Loss, unet: nn.Module, layers: Sequence[str], alphas: Sequence[float], seed: int = 0
) -> list[list[float]]:
    """Losses `L(W' + alpha * d_1 + beta * d_2)`: figure 6 of arXiv 2409.14396; see `landscape_line`.

    Returns:
        For each alpha the losses, one a beta (the same values).
    """
    one, two = (_direction(unet, layers, seed, index) for index in range(2))
    return [[_loss_at(loss, unet, [(alpha, one), (beta, two)]) for beta in alphas] for alpha in alphas]


def _direction(unet: nn.Module, layers: Sequence[str], seed: int, index: int) -> dict[str, Tensor]:
    """A direction by layer, in the main memory: of the full weight space it is as large as the UNet."""
    return {name: filter_normalised(unet, name, seed, index).cpu() for name in layers}


def filter_normalised(unet: nn.Module, layer: str, seed: int, index: int) -> Tensor:
    """A random direction of a layer's weight whose filters are as long as the weight's own."""
    weight = weight_of(unet.get_submodule(layer))
    normals = _normals(weight, seed, "direction", index, layer)
    lengths = filter_norms(normals)
    return (normals * (filter_norms(weight) / lengths)).to(weight.dtype)


def top_eigenvalue(
    losses: Callable[[nn.Module], Iterable[Tensor]],
    unet: nn.Module,
    layers: Sequence[str],
    *,
    iterations: int = 60,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> float | None:
    """The largest eigenvalue of the loss's Hessian with respect to merged weights.

    By Lanczos' iteration: power iteration that looks at all its vectors at once. It takes the same products,
    converges in far fewer, and tells the largest eigenvalue from a negative one that is larger by magnitude,
    which the loss of a UNet often has. Vectors aren't made orthogonal again: that spoils none of the extreme
    eigenvalues, and three of them are all that is kept. Hessian-vector products are exact (two backward
    passes each) as far as the UNet's precision goes: half precision is not enough.

    Args:
        losses: The loss of a UNet as parts whose sum it is, differentiable; each part's graph is freed before
            the next is made.
        unet: With merged weights.
        layers: Names of the layers whose weights count.
        iterations: At most; a product each.
        tolerance: Of the bound of the error, relative to the eigenvalue.
        seed: Of the first vector.

    Returns:
        The eigenvalue; None where it isn't known that well after all iterations, or isn't finite.

    Raises:
        ValueError: There are no layers.
    """
    if not layers:
        raise ValueError("no layers whose weights count")
    weights = [weight_of(unet.get_submodule(name)) for name in layers]

    def product(vector: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in weights]
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for part in losses(unet):
                gradients = torch.autograd.grad(part, weights, create_graph=True)
                products = [(g * v).sum() for g, v in zip(gradients, vector, strict=True)]
                slope = sum(products, start=products[0].new_zeros(()))
                for own, more in zip(total, torch.autograd.grad(slope, weights), strict=True):
                    own += more
        return total

    start = [
        _normals(weight, seed, "eigenvector", 0, name).to(weight.dtype)
        for weight, name in zip(weights, layers, strict=True)
    ]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        return _lanczos(product, start, iterations, tolerance)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _lanczos(
    product: Callable[[list[Tensor]], list[Tensor]], start: list[Tensor], iterations: int, tolerance: float
) -> float | None:
    """The largest eigenvalue of a symmetric operator."""
    length = _length(start)
    vector, before, coupling = [part / length for part in start], None, 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(iterations):
        image = product(vector)
        diagonal.append(sum(float((i * v).sum()) for i, v in zip(image, vector, strict=True)))
        for place, (own, now) in enumerate(zip(image, vector, strict=True)):
            own -= diagonal[-1] * now
            if before is not None:
                own -= coupling * before[place]
        coupling = _length(image)
        if not math.isfinite(diagonal[-1] + coupling):
            return None
        projected = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            sides = torch.tensor(beside, dtype=torch.float64)
            projected += torch.diag(sides, 1) + torch.diag(sides, -1)
        values, vectors = torch.linalg.eigh(projected)
        # An eigenvalue lies this near (Parlett, The Symmetric Eigenvalue Problem, section 13.2).
        if coupling * abs(vectors[-1, -1].item()) <= tolerance * abs(values[-1].item()):
            return values[-1].item()
        beside.append(coupling)
        before, vector = vector, [part / coupling for part in image]
    return None


def _length(vector: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in vector))


def _noise(unet: nn.Module, layer: str, seed: int, draw: int) -> Tensor:
    """Noise for sigma 1: standard deviation `||W'_i|| / sqrt(n)` in each filter."""
    weight = weight_of(unet.get_submodule(layer))
    std = filter_norms(weight) / math.sqrt(weight[0].numel())
    return (_normals(weight, seed, "noise", draw, layer) * std).to(weight.dtype)


def _normals(weight: Tensor, *key: object) -> Tensor:
    """Unit normals in the weight's shape, float32, the same on every device."""
    return torch.randn(weight.shape, generator=keyed_generator("flatness", *key)).to(weight.device)


def _loss_at(loss: Loss, unet: nn.Module, moves: Sequence[tuple[float, dict[str, Tensor]]]) -> float:
    """The loss at `W' + sum of factor * direction`."""
    weights = {}
    for name in moves[0][1]:
        own = weight_of(unet.get_submodule(name)).data
        weights[name] = own + sum(factor * direction[name].to(own.device) for factor, direction in moves)
    with replaced(unet, weights):
        return loss(unet)
