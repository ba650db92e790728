"""When the rows of a batch are computed as alone; that they get those bits is tested by its pictures."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from flatlora_diffusion.draw.pipeline import Drawing, _denoise
from flatlora_diffusion.draw.rows import RowsAsAlone


class Pipeline(SimpleNamespace):
    """Where a pipeline is, and an operation in place of its denoising."""

    def __call__(self, **settings):
        return (torch.ones(2).neg(),)


@pytest.mark.parametrize(
    ("pictures", "device", "needed"),
    [(1, "cpu", False), (2, "cpu", True), (1, "cuda", False), (2, "cuda", False), (2, "mps", False)],
)
def test_it_costs_nothing_where_it_does_nothing(pictures, device, needed, monkeypatch):
    calls = []

    def noting(mode, function, types, arguments=(), settings=None):
        calls.append(function)
        return function(*arguments, **(settings or {}))

    monkeypatch.setattr(RowsAsAlone, "__torch_function__", noting)
    pipeline = Pipeline(scheduler=DDIMScheduler(), device=torch.device(device))
    _denoise(pipeline, range(pictures), Drawing(8, 8, 2), None)
    assert bool(calls) is needed
