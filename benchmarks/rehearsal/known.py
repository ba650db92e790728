"""Small tensors that descend from known numbers keep them, on every device: code can branch on them.

Schedules of samplers, timesteps, token ids and places are made of numbers; weights on the card, noise and all
that a model computes of them have none. The real code of diffusers and of this project runs on both. What is
real and stays in the main memory is computed for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_MOST = 4096  # elements: schedules have a thousand
_MADE_OF_NUMBERS = ("arange", "linspace", "full", "zeros", "ones", "eye", "empty", "scalar_tensor")
_WITHOUT = ("rand", "normal", "uniform", "bernoulli", "multinomial", "exponential")


@contextlib.contextmanager
def numbers() -> Iterator[None]:
    """Inside `fake.without_a_driver`: numbers are followed, and every question for one has an answer.

    Where nothing is known the answer is that of a sound picture: what is asked for a truth is true (numbers
    are finite, say), a value is 1, an array is 0.
    """
    with _Followed(), _Outside():
        yield


class _Followed(TorchDispatchMode):
    """Computes beside each operation the numbers of its result, where those of all its inputs are known."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        if name == "device":
            return function(*args, **kwargs)
        known, real = _is_known(name, args, kwargs), None
        if known:
            on_cpu = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
            with unset_fake_temporarily():
                real = function(*_real(args), **(_real(kwargs) | on_cpu))
            if not isinstance(real, Tensor | tuple | list) or _is_on_cpu(args, kwargs):
                return real
        elif name == "_local_scalar_dense":
            return {torch.bool: True}.get(args[0].dtype, 1 if not args[0].is_floating_point() else 1.0)
        elif name == "equal":
            return True
        try:
            # It checks where its inputs are, too.
            result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not known:
                raise
            device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            result = tree_map(lambda t: torch.empty_like(t, device=device), real)
        numbers = tree_leaves(real) if known else []
        for place, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, FakeTensor):
                own = numbers[place] if place < len(numbers) else None
                tensor.numbers = own if own is not None and own.numel() <= _MOST else None
        return result


class _Outside(TorchFunctionMode):
    """Reads files into real tensors, and makes numpy's arrays, which know no fake ones."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.asarray:  # of a file's bytes
            with unset_fake_temporarily():
                return function(*args, **(kwargs or {}))
        if function is Tensor.numpy and isinstance(args[0], FakeTensor):
            assert args[0].device.type == "cpu", "numpy reads the main memory only"
            with unset_fake_temporarily():
                found = _numbers(args[0])
                zeros = torch.zeros(args[0].shape, dtype=args[0].dtype)
                return (zeros if found is None else found).numpy()
        return function(*args, **(kwargs or {}))


def _numbers(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "numbers", None)
    return tensor if tensor.device.type == "cpu" else None


def _is_known(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the numbers of an operation's result follow from what is known."""
    if any(word in name for word in _WITHOUT):
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        return name in _MADE_OF_NUMBERS
    return all(_numbers(tensor) is not None for tensor in tensors)


def _is_on_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether real tensors make another real one."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    return not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))


def _real(tree: Any) -> Any:
    return tree_map(lambda leaf: _numbers(leaf) if isinstance(leaf, Tensor) else leaf, tree)
