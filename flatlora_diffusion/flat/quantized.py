"""Bases in 4 or 8 bits through bitsandbytes: reading the weights of their layers.

bitsandbytes is never imported before a base is to be quantised: layers of its exist only where somebody has
imported it.
"""

from __future__ import annotations

import sys
from typing import TypeGuard

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn


class QuantizedWeight:
    """The frozen weight of a layer of bitsandbytes, as the layer computes with it.

    Args:
        base: A `Linear4bit` or a `Linear8bitLt` that holds a quantised weight.
    """

    def __init__(self, base: nn.Linear) -> None:
        self._base = base

    @property
    def shape(self) -> torch.Size:
        """Filters and inputs, (m, n); a 4-bit weight is stored as (m * n / 2, 1)."""
        return torch.Size((self._base.out_features, self._base.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """Of what `dequantized` gives: for 4 bits the dtype that was quantised, for 8 bits float32."""
        state = getattr(self._base.weight, "quant_state", None)
        return torch.float32 if state is None else state.dtype

    def dequantized(self) -> Tensor:
        """The weight (m, n): a new tensor each time.

        Raises:
            ValueError: bitsandbytes has repacked the weight for inference on a CPU with AVX512-BF16.
        """
        base = self._base
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked the 4-bit weights for inference in eval() mode: they cannot be "
                "trained any more; set support_avx512bf16_for_cpu=False on the Linear4bit layers beforehand"
            )
        assert isinstance(base.weight, nn.Parameter)
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """That to which the layer casts its input x."""
        return getattr(self._base, "compute_dtype", None) or x.dtype


def is_of_bitsandbytes(base: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is a linear layer of bitsandbytes."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(base, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def is_quantized(base: nn.Linear) -> bool:
    """Whether a layer of bitsandbytes holds a quantised weight: it gets one when it is moved to a device."""
    return getattr(base.weight, "quant_state", None) is not None or base.weight.dtype == torch.int8
