"""The rehearsal where there is no CUDA build, and the table that the tests on a card compare with."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.rehearsal.__main__ import main
from benchmarks.rehearsal.known import numbers
from tests.gpu.test_memory import KEPT, KEPT_FLAT, RECOMPUTED, WEIGHTS, computed


def test_without_a_cuda_build_it_says_how_to_make_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4 and told[0].startswith("this torch has no CUDA build")


@pytest.mark.parametrize(("row", "figures"), [(WEIGHTS, 1), (KEPT, 1), (KEPT_FLAT, 1), (RECOMPUTED, 2)])
def test_the_table_has_the_rows_that_are_measured_on_a_card(row, figures):
    found = computed(row)
    assert len(found) == figures and min(found) > 0


def test_a_sampler_goes_its_way_with_latents_that_have_no_numbers():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    expected = scheduler.timesteps.tolist()
    with FakeTensorMode(allow_non_fake_inputs=True), numbers():
        scheduler.set_timesteps(3, device="meta")
        latents = torch.randn(1, 4, 8, 8, device="meta")
        steps = []
        for timestep in scheduler.timesteps:
            latents = scheduler.step(torch.randn_like(latents), timestep, latents).prev_sample
            steps.append(timestep.item())
        assert isinstance(latents, FakeTensor) and latents.device.type == "meta"
        assert latents.isfinite().all()
        with pytest.raises(RuntimeError):
            latents + torch.randn(1, 4, 8, 8)  # of another device
    assert steps == expected
