"""Norms of the rows of merged weights, without forming a merged weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# torch gives its type checkers no signature of it.
_vecdot: Callable[[Tensor, Tensor], Tensor] = torch.linalg.vecdot  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

# Weights in half precision are converted to float32 in pieces of at most this many elements (8 MiB), so that
# the largest layer needs no larger a temporary than a small one.
_CONVERSION_BLOCK = 1 << 21


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    """The rows of `weight` (m, n) in float32, a few at a time."""
    if weight.dtype == torch.float32:
        yield weight
        return
    rows = max(1, _CONVERSION_BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows].float()


def row_norms_squared(weight: Tensor) -> Tensor:
    """Squared Euclidean norm of each row of `weight` (m, n), in float32: shape (m,)."""
    return torch.cat([_vecdot(block, block) for block in _row_blocks(weight)])


def _projection(weight: Tensor, a: Tensor) -> Tensor:
    """`weight @ a.T`, (m, r), in float32."""
    if weight.dtype == torch.float32:
        return F.linear(weight, a)
    blocks = [F.linear(block, a) for block in _row_blocks(weight)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def merged_row_norms(weights: Iterable[Tensor], weight_norms_squared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Norm of each row of `W' = W + B @ A` for L layers of one shape, forming no `W'`: (L, m), float32.

        ||W'_i||^2 = ||W_i||^2 + 2 <(W A^T)_i, B_i> + B_i (A A^T) B_i^T

    needs O(m * r) memory a layer. Several adapters on a layer are one product of their concatenated factors,
    and scalings are folded into B.

    Args:
        weights: The L base weights W (m, n), in any floating dtype, taken one after the other.
        weight_norms_squared: `row_norms_squared` of each (L, m), which callers keep: W never changes.
        a: The L factors A (L, r, n), float32.
        b: The L factors B (L, m, r), float32, times their scalings.
    """
    projections = torch.stack(
        [_projection(weight, factor) for weight, factor in zip(weights, a.unbind(), strict=True)]
    )
    cross_and_square = _vecdot(torch.baddbmm(projections, b, a @ a.mT, beta=2), b)
    # Rounding can leave a tiny negative where the adapter cancels a row of the base weight.
    return (weight_norms_squared + cross_and_square).clamp_min_(0).sqrt_()
