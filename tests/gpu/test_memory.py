"""SDXL at 1024 px on a CUDA card: memory against the table of docs/training.md, Flat-LoRA against plain LoRA.

Weights are random. What doesn't fit onto the card is skipped.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.bases import SDXL
from benchmarks.rehearsal.step import losses
from flatlora_diffusion import FlatLoRA
from flatlora_diffusion.sdxl.lora import add_lora, enable_gradient_checkpointing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card"),
]

GIB = 2**30
TABLE = Path(__file__).parents[2] / "docs" / "training.md"
WEIGHTS, KEPT, KEPT_FLAT, RECOMPUTED = (
    "UNet with its adapter",
    "kept for the backward pass",
    "the same, Flat-LoRA",
    "with `--gradient_checkpointing`",
)
TOLERANCE = 0.1  # of what the table says, and GiB on top: its figures know no gaps between tensors
WORKSPACES = (
    1.0  # GiB that the table asks to leave for kernels and the tensors that a layer needs for a moment
)
STEPS = 5


def computed(begin: str) -> list[float]:
    """The figures in bf16 of the table's row that begins so, in GiB."""
    (row,) = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith(f"| {begin}")]
    return [float(figure) for figure in row.split("|")[2].split("/")]


def sdxl_unet(checkpointing: bool) -> nn.Module:
    """SDXL's UNet in bf16 with the paper's adapter; it never takes more room than that."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL.unet).requires_grad_(False)
    nn.Module.to(unet, torch.bfloat16)
    unet.to_empty(device="cuda")
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    add_lora({"unet": unet}, rank=4, alpha=4, seed=0)
    if checkpointing:
        enable_gradient_checkpointing(unet)
    return unet.to("cuda").train()


def measured(unet: nn.Module, flat: FlatLoRA | None) -> tuple[float, float, float]:
    """GiB that a forward pass keeps, GiB of a whole step beside the weights, and its median seconds."""
    seconds, kept = [], 0.0
    for step in range(1 + STEPS):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        loss = losses(unet, 1, 128, 2048, 1280, "cuda")
        kept = (torch.cuda.memory_allocated() - before) / GIB
        loss.backward()
        torch.cuda.synchronize()
        if step:  # the first one also prepares what is kept for all
            seconds.append(time.perf_counter() - began)
        unet.zero_grad()
        if flat is not None:
            flat.step()
    return kept, (torch.cuda.max_memory_allocated() - before) / GIB, statistics.median(seconds)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_takes_what_the_table_says_and_flat_lora_no_more_than_plain_lora(checkpointing):
    (weights,) = computed(WEIGHTS)
    if checkpointing:
        plain_kept, recomputed = computed(RECOMPUTED)
        flat_kept = plain_kept
    else:
        (plain_kept,), (flat_kept,), recomputed = computed(KEPT), computed(KEPT_FLAT), 0.0
    needed = weights + plain_kept + recomputed + WORKSPACES
    if (free := torch.cuda.mem_get_info()[0] / GIB) < needed:
        pytest.skip(f"{free:.1f} GiB are free, and it needs {needed:.1f}")
    before = torch.cuda.memory_allocated()
    unet = sdxl_unet(checkpointing)
    found = (torch.cuda.memory_allocated() - before) / GIB
    plain = measured(unet, None)
    flat_lora = FlatLoRA(unet, sigma=0.1, total_steps=9, schedule="constant")
    flat = measured(unet, flat_lora)
    flat_lora.remove()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {checkpointing=}:")
    print(f"  UNet {found:.2f} GiB (table {weights:.2f})")
    for name, (kept, step, seconds), expected in (
        ("LoRA", plain, plain_kept),
        ("Flat-LoRA", flat, flat_kept),
    ):
        print(f"  {name}: keeps {kept:.2f} GiB (table {expected:.2f}), a step {step:.2f}, {seconds:.3f} s")
    print(f"  Flat-LoRA takes {flat[2] / plain[2]:.3f} of plain LoRA's time")
    assert found == pytest.approx(weights, rel=TOLERANCE)
    for (kept, step, _), expected in ((plain, plain_kept), (flat, flat_kept)):
        assert kept == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        assert expected * (1 - TOLERANCE) <= step <= expected + recomputed + WORKSPACES
    # W + eps is there for one layer at a time, and the table of normals has 32 MiB.
    assert flat[1] <= plain[1] + TOLERANCE
