"""Muon (Jordan et al., 2024) for linear and convolutional weights, in float32.

``torch.optim.Muon`` takes matrices only and works in bfloat16, which most CPUs emulate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, from Muon's authors
ITERATIONS = 5
MOMENTUM = 0.95
# An orthogonal (m, n) update has entries of size 1/sqrt(max(m, n)); this factor gives it the size that Adam's
# updates have in practice, so that both optimizers share one learning rate (Liu et al., 2025).
ADAM_SIZE = 0.2


@torch.no_grad()
def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Move all singular values of a matrix to about 1, by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised; a convolution counts as (out, in * kh * kw)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        """Take weights of two or more dimensions; the learning rate is on Adam's scale."""
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonalize(weight.grad.lerp(momentum, MOMENTUM).flatten(1))
                size = ADAM_SIZE * max(update.shape) ** 0.5
                weight.add_(update.reshape(weight.shape), alpha=-group["lr"] * size)
