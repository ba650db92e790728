"""How much memory a step takes, as far as that can be told before, and how much there is.

The figures are those of `python -m benchmarks.rehearsal --full`: computed, not measured on a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

GIB = 2**30
SIDE = 1024  # of the pictures that the figures are for


@dataclass(frozen=True)
class StepFigures:
    """GiB of a training step of SDXL at 1024 px with the paper's adapter.

    Attributes:
        unet: The UNet with its adapter.
        plain: Kept for the backward pass, each sample: plain LoRA.
        flat: The same with noise on the weights.
        checkpointed: The same with gradient checkpointing.
        recomputed: With it, the greatest part that is computed again, each sample.
        denoising: Denoising a picture with guidance, beside the UNet.
        decoding: Decoding a picture, beside the UNet.
        decoding_tile: The same in tiles of 512 px.
    """

    unet: float
    plain: float
    flat: float
    checkpointed: float
    recomputed: float
    denoising: float
    decoding: float
    decoding_tile: float


HALF = StepFigures(4.80, 7.18, 6.74, 0.54, 0.22, 0.40, 1.50, 0.38)
"""In bf16, and as much in fp16."""
SINGLE = StepFigures(9.59, 10.40, 10.40, 0.94, 0.23, 0.62, 3.00, 0.75)
"""In float32."""
ENCODING = 2.51
"""Encoding a training image in float32, before the UNet is there."""
BESIDE = 1.5
"""What CUDA itself and gaps between tensors take: 1 to 2."""

_QUANTISED = {None: 1.0, "8bit": 0.5, "4bit": 0.25}  # of the weights in 16 bits


def step_memory(
    *,
    samples: int,
    resolution: int,
    half: bool,
    checkpointing: bool,
    noisy: bool,
    quantised: str | None = None,
    share: float = 1.0,
) -> float:
    """About how many GiB a training step takes; text encoders that are trained aren't counted.

    Args:
        samples: At once, class images included.
        resolution: Side of the images in pixels; what is kept grows with their area.
        half: bf16 or fp16, not float32.
        checkpointing: Activations are computed again in the backward pass.
        noisy: The weights have noise.
        quantised: The value of --quantize_base.
        share: Parameters of the UNet relative to SDXL's.
    """
    figures = HALF if half else SINGLE
    weights = figures.unet if quantised is None else HALF.unet * _QUANTISED[quantised]
    kept = figures.flat if noisy else figures.plain
    sample = figures.checkpointed + figures.recomputed if checkpointing else kept
    step = share * (weights + samples * sample * (resolution / SIDE) ** 2)
    return max(step, share * ENCODING * (resolution / SIDE) ** 2) + BESIDE


@dataclass(frozen=True)
class Room:
    """Memory at hand.

    Attributes:
        gib: How much is free.
        where: Of what, in words.
        kind: Of the device: `cuda`, `mps` or `cpu`.
        bf16: Whether the device computes in bf16 at full speed.
    """

    gib: float
    where: str
    kind: str
    bf16: bool = False


def room_on(device: torch.device) -> Room:
    """What is free on a device now."""
    import torch  # here: the figures are told before anything slow is imported

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Room(free / GIB, name, "cuda", torch.cuda.is_bf16_supported(including_emulation=False))
    where = "the machine" if device.type == "cpu" else "the machine, which the GPU shares"
    return Room(psutil.virtual_memory().available / GIB, where, device.type)
