"""The noise of Flat-LoRA as plain functions of tensors: schedules, sources of unit normals.

Equation numbers are those of Li et al., "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape"
(ICML 2025, arXiv 2409.14396). Nothing here knows of modules, and nothing touches the global RNG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flatlora_diffusion.common.seeds import hash64

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


class Draw(Protocol):
    """One draw of noise for one weight: what is kept for the backward pass in place of the noise itself."""

    def epsilon(self) -> Tensor:
        """The noise `eps[i, j] = row_std[i] * z[i, j]` (equation 7): a new tensor (m, n), always the same."""
        ...

    def added_to(self, weight: Tensor) -> Tensor:
        """A new tensor `W + eps` of the weight's shape (m, ...): all dimensions but the first are inputs.

        A fused multiply-add: it rounds once where `weight + epsilon()` rounds twice.
        """
        ...


class NoiseSource(Protocol):
    """Noise as a pure function of a key."""

    def draws(self, keys: Sequence[int], row_std: Tensor, inputs: int) -> Sequence[Draw]:
        """Noise for L weights of one shape, with a key each.

        Args:
            keys: The L keys.
            row_std: Standard deviations of the weights' rows, (L, m). The noise has its dtype and device.
            inputs: Columns n of each weight.
        """
        ...


def _per_row(values: Tensor, weight: Tensor) -> Tensor:
    """A value for each row of the weight, shaped to be multiplied with it."""
    return values.view(-1, *[1] * (weight.dim() - 1))


@dataclass(slots=True)
class GaussianDraw:
    """Normals that a private generator makes anew each time they are asked for."""

    key: int
    row_std: Tensor
    inputs: int

    def epsilon(self) -> Tensor:
        """See `Draw.epsilon`."""
        return self._normals().mul_(self.row_std[:, None])

    def added_to(self, weight: Tensor) -> Tensor:
        """See `Draw.added_to`."""
        normals = self._normals().view(weight.shape)
        return torch.addcmul(weight, normals, _per_row(self.row_std, weight), out=normals)

    def _normals(self) -> Tensor:
        std = self.row_std
        generator = torch.Generator(device=std.device).manual_seed(self.key)
        return torch.randn((len(std), self.inputs), generator=generator, dtype=std.dtype, device=std.device)


class GaussianSource:
    """Fresh normals for every key."""

    def draws(self, keys: Sequence[int], row_std: Tensor, inputs: int) -> list[GaussianDraw]:
        """See `NoiseSource.draws`."""
        return [GaussianDraw(key, std, inputs) for key, std in zip(keys, row_std, strict=True)]


@dataclass(slots=True)
class TableDraw:
    """Windows of the table, a few rows each, with the signed standard deviations of their rows (rows, 1)."""

    windows: Sequence[tuple[Tensor, Tensor]]

    def epsilon(self) -> Tensor:
        """See `Draw.epsilon`."""
        blocks = [normals * signed_std for normals, signed_std in self.windows]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def added_to(self, weight: Tensor) -> Tensor:
        """See `Draw.added_to`."""
        if len(self.windows) == 1:
            normals, signed_std = self.windows[0]
            if weight.dim() > 2:
                normals, signed_std = normals.view(weight.shape), _per_row(signed_std, weight)
            return torch.addcmul(weight, normals, signed_std)
        noisy = torch.empty_like(weight)
        start = 0
        for normals, signed_std in self.windows:
            rows = slice(start, start + len(normals))
            block = weight[rows]
            torch.addcmul(block, normals.view(block.shape), _per_row(signed_std, block), out=noisy[rows])
            start += len(normals)
        return noisy


_SMALLEST_TABLE, _LARGEST_TABLE = 1 << 20, 1 << 24


class TableSource:
    """Windows into one fixed table of unit normals, each at a hashed offset with a hashed sign per row.

    A draw needs no random numbers: a window is a view, and the signs go into the row scales. Two draws share
    values only where their windows overlap, at other positions and with other signs, so they are
    uncorrelated. Weights larger than `size / 4` elements take several windows, so that even the largest
    have many offsets to choose from.

    Args:
        seed: Decides the table's content.
        elements: Number of weights that are perturbed in a step. The table has as many normals, rounded up
            to a power of two, but at least 2^20 (so that windows have many offsets) and at most 2^24 (32 MiB
            in half precision).
    """

    def __init__(self, seed: int, elements: int = _LARGEST_TABLE) -> None:
        self._seed = seed
        self._size = min(max(1 << (elements - 1).bit_length(), _SMALLEST_TABLE), _LARGEST_TABLE)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        table = self._tables.get((dtype, device))
        if table is None:
            # Drawn on the CPU in float32 whatever the model, so that a seed means the same noise everywhere.
            generator = torch.Generator().manual_seed(hash64(self._seed, "table"))
            table = torch.randn(self._size, generator=generator).to(device=device, dtype=dtype)
            self._tables[dtype, device] = table
        return table

    def draws(self, keys: Sequence[int], row_std: Tensor, inputs: int) -> list[TableDraw]:
        """See `NoiseSource.draws`. A few operations for all of the weights; the windows are views."""
        table = self._table(row_std.dtype, row_std.device)
        m = row_std.shape[1]
        rows_at_once = min(m, max(1, self._size // 4 // inputs))
        windows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in keys]
        for start in range(0, m, rows_at_once):
            std = row_std[:, start : start + rows_at_once]
            rows = std.shape[1]
            hashes = [divmod(hash64(key, start), 1 << 32) for key in keys]
            sign_offsets = [sign_hash % (self._size - rows + 1) for _, sign_hash in hashes]
            places = torch.tensor(sign_offsets, device=table.device)[:, None]
            signs = table[places + torch.arange(rows, device=table.device)]
            signed = torch.copysign(std, signs)[:, :, None].unbind()
            for of_weight, signed_std, (window_hash, _) in zip(windows, signed, hashes, strict=True):
                offset = window_hash % (self._size - rows * inputs + 1)
                window = table.as_strided((rows, inputs), (inputs, 1), offset)
                of_weight.append((window, signed_std))
        return [TableDraw(of_weight) for of_weight in windows]


SOURCES: dict[str, Callable[[int, int], NoiseSource]] = {
    "table": TableSource,
    "gaussian": lambda seed, elements: GaussianSource(),
}
"""Name of each source -> what makes it, of a seed and of the number of weights that are perturbed."""
