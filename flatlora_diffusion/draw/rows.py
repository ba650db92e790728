"""Pictures of a batch with the bits that each has alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RowsAsAlone(TorchFunctionMode):
    """Within the block, a picture's rows get on the CPU the bits that they have alone.

    There are other algorithms for products of matrices where a thread gets but few rows, and for convolutions
    of a single image (a picture drawn without guidance): these are computed for each picture apart, as they
    would be alone. In all others, and in attention, a row's bits don't depend on the rows beside it. GPUs
    choose by size everywhere: there it is of no use.

    Args:
        pictures: In the batch, two or more. Inputs have a multiple of it in their first dimension, and a
            picture's rows are `pictures` apart: diffusers puts those without a prompt before the others.
    """

    ROWS_A_THREAD = 16  # up to 3 were seen to matter

    def __init__(self, pictures: int) -> None:
        super().__init__()
        self._pictures = pictures

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of every function of it."""
        settings = settings or {}
        if not self._depends_on_others(function, arguments):
            return function(*arguments, **settings)
        inputs, *others = arguments
        parts = [
            function(inputs[picture :: self._pictures].contiguous(), *others, **settings)
            for picture in range(self._pictures)
        ]
        return torch.stack(parts, dim=1).flatten(0, 1)

    def _depends_on_others(self, function: Callable[..., Any], arguments: Sequence[Any]) -> bool:
        if function not in (F.linear, F.conv2d) or arguments[0].device.type != "cpu":
            return False
        inputs: Tensor = arguments[0]
        if function is F.conv2d:
            return len(inputs) == self._pictures
        alone = inputs[..., 0].numel() // self._pictures
        return alone < self.ROWS_A_THREAD * torch.get_num_threads()
