"""The noise of Flat-LoRA as plain functions of tensors: schedules, row norms, sources of unit normals.

Equation numbers are those of Li et al., "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape"
(ICML 2025, arXiv 2409.14396). Nothing here knows of modules, and nothing touches the global RNG.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
    "constant": lambda progress: 1.0,
}
"""Name of each schedule -> the share of sigma in force after a share `progress` in [0, 1] of the steps."""


def sigma_at(sigma: float, step: int, total_steps: int, schedule: str) -> float:
    """Strength of the noise at one optimizer step.

    `cosine` is the paper's `sigma_t = sigma * (1 - cos(pi * t / T)) / 2`: the noise grows with the adapter.
    Past the last step the value stays at `sigma`.
    """
    return sigma * SCHEDULES[schedule](min(step / total_steps, 1.0))


def hash64(*parts: object) -> int:
    """A 64-bit key that is the same in every process and version of Python, unlike `hash`."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class LowRank:
    """One adapter `dW = scaling * b @ a` in float32, with `a` of shape (r, n) and `b` of shape (m, r)."""

    scaling: float
    a: Tensor
    b: Tensor


# Weights in half precision are converted to float32 in pieces of at most this many elements (8 MiB), so that
# the largest layer needs no larger a temporary than a small one.
_CONVERSION_BLOCK = 1 << 21


def _row_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Float32 pieces of `weight` (m, n) with the row at which each starts."""
    if weight.dtype == torch.float32:
        yield 0, weight
        return
    rows = max(1, _CONVERSION_BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield start, weight[start : start + rows].float()


def row_norms_squared(weight: Tensor) -> Tensor:
    """Squared Euclidean norm of each row of `weight` (m, n), in float32: shape (m,)."""
    return torch.cat([block.square().sum(dim=1) for _, block in _row_blocks(weight)])


def merged_row_norms(weight: Tensor, weight_norms_squared: Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """Norm of each row of `W' = W + sum_k s_k * B_k @ A_k` without forming `W'`: shape (m,), float32.

    The sum of adapters is one product `B @ A` of the concatenated factors (scalings folded into B), so

        ||W'_i||^2 = ||W_i||^2 + 2 <(W A^T)_i, B_i> + B_i (A A^T) B_i^T

    needs O(m * r) memory.

    Args:
        weight: The base weight W (m, n) in any floating dtype.
        weight_norms_squared: `row_norms_squared(weight)`, which callers keep: W never changes.
        adapters: The adapters that act on W.
    """
    if not adapters:
        return weight_norms_squared.sqrt()
    a = torch.cat([adapter.a for adapter in adapters])
    b = torch.cat([adapter.b * adapter.scaling for adapter in adapters], dim=1)
    projection = torch.cat([block @ a.T for _, block in _row_blocks(weight)])  # W A^T, (m, r)
    cross_and_square = (torch.addmm(projection, b, a @ a.T, beta=2) * b).sum(dim=1)
    # Rounding can leave a tiny negative where the adapter cancels a row of the base weight.
    return (weight_norms_squared + cross_and_square).clamp_min_(0).sqrt_()


class NoiseSource(Protocol):
    """Unit normals as a pure function of a key."""

    def blocks(
        self, key: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Unit normals for an (m, n) weight, a few rows at a time.

        Yields:
            The first row of the block, its normals (rows, n), which may be a read-only view, and values
            (rows,) whose signs multiply the rows, or None.
        """
        ...


class GaussianSource:
    """Fresh normals from a private generator for every key."""

    def blocks(
        self, key: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """See `NoiseSource.blocks`."""
        generator = torch.Generator(device=device).manual_seed(key)
        yield 0, torch.randn(shape, generator=generator, dtype=dtype, device=device), None


class TableSource:
    """Windows into one fixed table of unit normals, each at a hashed offset with a hashed sign per row.

    A draw costs no arithmetic: a window is a view, and the signs go into the row scales. Two draws share
    values only where their windows overlap, at other positions and with other signs, so they are
    uncorrelated. Weights larger than `size / 4` elements take several windows, so that even the largest
    have many offsets to choose from.

    Args:
        seed: Decides the table's content.
        size: Number of normals; the default is 32 MiB in half precision.
    """

    def __init__(self, seed: int, size: int = 1 << 24) -> None:
        self._seed = seed
        self._size = size
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        table = self._tables.get((dtype, device))
        if table is None:
            # Drawn on the CPU in float32 whatever the model, so that a seed means the same noise everywhere.
            generator = torch.Generator().manual_seed(hash64(self._seed, "table"))
            table = torch.randn(self._size, generator=generator).to(device=device, dtype=dtype)
            self._tables[dtype, device] = table
        return table

    def blocks(
        self, key: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """See `NoiseSource.blocks`."""
        table = self._table(dtype, device)
        m, n = shape
        rows_at_once = min(m, max(1, self._size // 4 // n))
        for start in range(0, m, rows_at_once):
            rows = min(rows_at_once, m - start)
            offset = hash64(key, start, "window") % (self._size - rows * n + 1)
            signs = hash64(key, start, "signs") % (self._size - rows + 1)
            yield start, table[offset : offset + rows * n].view(rows, n), table[signs : signs + rows]


@dataclass(frozen=True)
class Noise:
    """One draw of noise for one weight: a source and the key of this draw.

    Small enough to keep for the backward pass in place of the noise itself.
    """

    source: NoiseSource
    key: int

    def added_to(self, weight: Tensor, row_std: Tensor) -> Tensor:
        """A new tensor `W + eps` with `eps[i, j] = row_std[i] * z[i, j]` (equation 7), in the weight's dtype.

        The product is rounded before the sum (no fused multiply-add), so that a weight to which `epsilon` has
        been added has the same bits.

        Args:
            weight: (m, ...); all dimensions but the first count as inputs of the filter.
            row_std: (m,), in the weight's dtype.
        """
        noisy = self.epsilon(weight, row_std)
        noisy += weight
        return noisy

    def epsilon(self, weight: Tensor, row_std: Tensor) -> Tensor:
        """The noise `eps` that `added_to` adds: a new tensor like `weight`."""
        filters = weight.flatten(1)
        eps = torch.empty_like(filters)
        for start, normals, signs in self.source.blocks(
            self.key, tuple(filters.shape), weight.dtype, weight.device
        ):
            stop = start + len(normals)
            std = row_std[start:stop]
            if signs is not None:
                std = torch.copysign(std, signs)
            torch.mul(normals, std[:, None], out=eps[start:stop])
        return eps.view_as(weight)
