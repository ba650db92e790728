"""Devices that aren't here, by their names: memory that runs out, models too large, RNGs, determinism."""

import gc
import logging
import weakref

import pytest
import torch

from flatlora_diffusion.common.devices import (
    deterministic_algorithms,
    if_memory_lasts,
    is_out_of_memory,
    out_of_memory_as_error,
    release,
    require_room,
)
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import seeded

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]
OTHERS = [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory"), UserError("no")]


def test_every_way_to_run_out_of_memory_is_known():
    assert all(map(is_out_of_memory, FULL)) and not any(map(is_out_of_memory, OTHERS))


@pytest.mark.parametrize("error", FULL[1:3], ids=str)
def test_it_is_told_or_passed_over(error, caplog):
    def work():
        raise error

    with (
        pytest.raises(UserError, match=r"^out of memory at step 3: try less$"),
        out_of_memory_as_error("at step 3: try less"),
    ):
        work()
    assert if_memory_lasts(lambda: 1, lambda: 2, "while it was drawn") == 1
    with caplog.at_level(logging.WARNING):
        assert if_memory_lasts(work, lambda: 2, "while it was drawn") == 2
    assert caplog.messages == ["out of memory while it was drawn"]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        if_memory_lasts(work, lambda: None, "")
    with pytest.raises(type(error)), out_of_memory_as_error(""):
        work()


def test_what_was_tried_is_gone_before_the_other_way():
    seen = []

    def work():
        large = torch.ones(3)
        seen.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert if_memory_lasts(work, lambda: seen[0]() is None, "")
    gc.collect()


def test_a_model_that_is_larger_than_the_card_is_refused(monkeypatch):
    model = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2**32))
    require_room(model, torch.device("cuda:0"), "the UNet in float32", "take less")
    require_room(model, torch.device("cpu"), "the UNet in float32", "take less")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 2**21))
    with pytest.raises(UserError, match=r"^the UNet in float32 takes 0\.0 GiB, and cuda:0 has 0\.0; take"):
        require_room(model, torch.device("cuda:0"), "the UNet in float32", "take less")


def test_memory_and_rng_of_mps(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", calls.append)
    release()
    with pytest.raises(KeyError), seeded(torch.device("mps"), 3):
        raise KeyError
    assert calls == ["emptied", "before"]


def test_determinism_ends_with_the_block(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
