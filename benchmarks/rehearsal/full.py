"""SDXL at 1024 px: what a step keeps and launches, what drawing takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.bases import SDXL
from benchmarks.rehearsal.fake import without_a_driver
from benchmarks.rehearsal.step import losses
from benchmarks.rehearsal.watch import Watch, storage_of
from flatlora_diffusion import FlatLoRA
from flatlora_diffusion.draw.decoding import decode
from flatlora_diffusion.sdxl.encoding import encode_images
from flatlora_diffusion.sdxl.lora import add_lora, enable_gradient_checkpointing

GIB = 2**30


def full_unet(device: str, dtype: torch.dtype, checkpointing: bool) -> nn.Module:
    """SDXL's UNet with the paper's adapter."""
    unet = UNet2DConditionModel(**SDXL.unet).requires_grad_(False).to(dtype)
    add_lora({"unet": unet}, rank=4, alpha=4, seed=0)
    if checkpointing:
        enable_gradient_checkpointing(unet)
    return unet.to(device).train()


def kept(unet: nn.Module, batch: int) -> tuple[float, float]:
    """GiB that a forward pass keeps for the backward pass, and of the greatest part that is recomputed."""
    own = {storage_of(p) for p in unet.parameters()}
    parts: list[int] = []

    def weighed(work: Callable[[], Any]) -> tuple[Any, int]:
        sizes: dict[int, int] = {}
        holding: list[Any] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
                holding.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return work(), sum(sizes.values())

    def part(function: Callable[..., Any], *args: Any) -> Any:
        """A part that is recomputed: what it keeps then, and of it nothing but its inputs now."""
        result, size = weighed(lambda: function(*args))
        parts.append(size)
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]
        return _Keep.apply(result.detach().requires_grad_(), *inputs)

    for module in unet.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = part
    _, size = weighed(lambda: losses(unet, batch, 128, 2048, 1280, "cuda"))
    return size / GIB, max(parts, default=0) / GIB


class _Keep(torch.autograd.Function):
    """A part that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return result.view_as(result)


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """The kernels that a card takes: flash, or the efficient one in float32 and for the VAE's wide head."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.dtype == torch.float32 or query.shape[-1] > 256:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, query.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextlib.contextmanager
def on_card() -> Iterator[None]:
    """Tensors without contents, and a card's attention."""
    with (
        without_a_driver(),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
    ):
        yield


def memory() -> Iterator[str]:
    """What a step at 1024 px keeps, and what drawing takes, line by line."""
    for dtype in (torch.bfloat16, torch.float32):
        for checkpointing in (True, False):
            yield of_step(dtype, checkpointing)
    for dtype in (torch.bfloat16, torch.float32):
        yield from of_drawing(dtype)


def of_step(dtype: torch.dtype, checkpointing: bool) -> str:
    """What the weights take, and what a step keeps."""
    with on_card():
        unet = full_unet("cuda", dtype, checkpointing)
        weights = sum(p.nbytes for p in unet.parameters()) / GIB
        plain, part = kept(unet, 1)
        flat = FlatLoRA(unet, sigma=0.1, total_steps=9, schedule="constant")
        noisy, _ = kept(unet, 1)
        flat.remove()
    return (
        f"{dtype}, checkpointing {checkpointing}: weights {weights:.2f} GiB; kept a sample {plain:.2f} "
        f"(Flat {noisy:.2f}); the greatest part that is recomputed {part:.2f}"
    )


def of_drawing(dtype: torch.dtype) -> list[str]:
    """What comes on top of the weights in the VAE and the UNet."""
    peaks: dict[str, float] = {}

    def note(name: str, model: nn.Module, work: Callable[[], object]) -> None:
        with Watch("cuda", model) as watch:
            work()
        peaks[name] = watch.peak / GIB

    with on_card(), torch.no_grad():
        vae = AutoencoderKL(**SDXL.vae).to("cuda", dtype)
        vae.register_to_config(force_upcast=False)
        for side in (128, 64):
            latents = torch.randn(1, 4, side, side, device="cuda", dtype=dtype)
            note(f"decoding {8 * side} px", vae, partial(decode, vae, latents))
        if dtype == torch.float32:
            note("encoding 1024 px", vae, partial(encode_images, vae, torch.randn(1, 3, 1024, 1024)))
        unet = full_unet("cuda", dtype, False).eval()
        note("denoising one guided picture", unet, partial(losses, unet, 2, 128, 2048, 1280, "cuda"))
    return [f"{dtype}, {name}: {peak:.2f} GiB" for name, peak in peaks.items()]


def launches() -> tuple[int, int]:
    """Of a step of SDXL's UNet with checkpointing, in bf16: plain LoRA's, Flat-LoRA's."""
    counted = []
    for noisy in (False, True):
        with without_a_driver():
            unet = full_unet("cpu", torch.bfloat16, True)
            flat = FlatLoRA(unet, sigma=0.1 * noisy, total_steps=9, schedule="constant")
            for _ in range(1 + noisy):  # the first step with noise also computes what is kept for all
                with Watch("cpu", unet) as watch:
                    losses(unet, 1, 128, 2048, 1280, "cpu").backward()
                flat.step()
            counted.append(watch.launches)
    return counted[0], counted[1]
