"""Counts launches, and the memory of tensors that only know their size."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_LAUNCH = (
    *("view", "t.", "detach", "transpose", "permute", "slice", "unsqueeze", "squeeze", "expand", "split"),
    *(
        "select",
        "alias",
        "as_strided",
        "reshape",
        "empty",
        "chunk",
        "unbind",
        "lift",
        "prim",
        "sym_",
        "_unsafe",
    ),
)


class Watch(TorchDispatchMode):
    """Counts what would be launched, and the bytes of the tensors that live on a device.

    Args:
        device: Its type.
        known: Models whose tensors were there before.
    """

    def __init__(self, device: str, *known: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.live = self.peak = 0
        self._device = device
        self._seen = {storage_of(t) for model in known for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls[str(function)] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                self._note(tensor)
        return result

    @property
    def launches(self) -> int:
        """Operations that are more than another view of a tensor."""
        return sum(
            number
            for name, number in self.calls.items()
            if not name.removeprefix("aten.").startswith(NO_LAUNCH)
        )

    def _note(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart: fake ones have no address."""
    return tensor.untyped_storage()._cdata
