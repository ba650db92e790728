"""A training step on tiny models, in every mode that the trainer has."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.rehearsal.fake import without_a_driver
from flatlora_diffusion import FlatLoRA
from flatlora_diffusion.flat import fused, noisy_base, quantized
from flatlora_diffusion.flat.noisy_base import compute_dequantized
from flatlora_diffusion.sdxl.encoding import PromptEmbeds
from flatlora_diffusion.sdxl.lora import UNET_TARGETS, add_lora, enable_gradient_checkpointing
from flatlora_diffusion.sdxl.loss import diffusion_losses
from flatlora_diffusion.sdxl.quantize import quantize
from flatlora_diffusion.train.ema import AdapterAverage
from flatlora_diffusion.train.update_norms import UpdateNorms

ALL_LAYERS = (*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": 112,
    "cross_attention_dim": 128,
    "norm_num_groups": 8,
}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 600,
    "projection_dim": 64,
    "bos_token_id": 598,
    "eos_token_id": 599,
    "pad_token_id": 599,
}


class OwnFunctions:
    """Within the block, notes what our own autograd functions keep, to call their backward passes by hand."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, Any, Tensor, tuple[Any, ...]]] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> OwnFunctions:
        for function in (fused.FusedLinear, fused.FusedConvolution, noisy_base._NoisyForward):
            self._patches.enter_context(mock.patch.object(function, "forward", self._noting(function)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _noting(self, function: Any) -> Any:
        forward = function.forward

        def noting(ctx: Any, *args: Any) -> Tensor:
            result = forward(ctx, *args)
            kept = SimpleNamespace(
                **vars(ctx), saved_tensors=ctx.to_save, needs_input_grad=ctx.needs_input_grad
            )
            self._noted.append((function, kept, result, args))
            return result

        return staticmethod(noting)

    def backward(self) -> int:
        """Call each; gradients have shape, dtype and device of what they belong to. How many there were."""
        for function, kept, result, args in self._noted:
            gradients = function.backward.__wrapped__(kept, torch.randn_like(result))
            for given, gradient in zip(args, gradients, strict=False):
                if isinstance(gradient, Tensor):
                    assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype), function
                    assert gradient.device.type == given.device.type == "cuda", function
        return len(self._noted)


def scheduler() -> DDPMScheduler:
    """The noise levels that SDXL is trained with."""
    with unset_fake_temporarily():
        return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def losses(unet: nn.Module, batch: int, side: int, width: int, pooled: int, device: str) -> Tensor:
    """The trainer's loss of a batch of random latents and embeddings."""
    dtype = unet.conv_in.weight.dtype
    shape = batch, 4, side, side
    prompts = PromptEmbeds(
        torch.randn(batch, 77, width, device=device, dtype=dtype),
        torch.randn(batch, pooled, device=device, dtype=dtype),
    )
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return diffusion_losses(
            unet,
            scheduler(),
            torch.randn(shape, device=device),
            torch.randn(shape, device=device),
            torch.full((batch,), 500, device=device),
            prompts,
            torch.full((batch, 6), 8 * side, device=device),
            snr_gamma=5.0,
        ).mean()


def rehearse_step(dtype: torch.dtype, source: str, **mode: Any) -> str:
    """A step with text encoders, what follows it, and a step after these were frozen and left the card."""
    with without_a_driver(), OwnFunctions() as functions:
        config = CLIPTextConfig(**TINY_TEXT)
        models: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**TINY_UNET),
            "text_encoder": CLIPTextModel(config),
            "text_encoder_2": CLIPTextModelWithProjection(config),
        }
        for model in models.values():
            model.requires_grad_(False).to(dtype)
        targets = ALL_LAYERS if mode.get("all_layers") else UNET_TARGETS
        dora = mode.get("dora", False)
        add_lora(models, rank=4, alpha=4, seed=0, unet_targets=targets, use_dora=dora)
        for model in models.values():
            if mode.get("checkpointing"):
                enable_gradient_checkpointing(model)
            model.to("cuda").train()
        flat = FlatLoRA(list(models.values()), sigma=0.1, total_steps=9, schedule="constant", noise=source)
        text_encoders = [model for name, model in models.items() if name != "unet"]
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            for text_encoder in text_encoders:
                ids = torch.zeros(2, 77, dtype=torch.long, device="cuda")
                text_encoder(ids, output_hidden_states=True)
        losses(models["unet"], 2, 8, 128, 64, "cuda")
        done = functions.backward()
        norms, average = UpdateNorms(models.values()), AdapterAverage(models.values(), 0.9)
        norms.measure()
        average.step()
        for text_encoder in text_encoders:
            text_encoder.requires_grad_(False).eval().to("cpu")
        # Moving a fake model makes new parameters: the average is of those on the card before.
        norms.measure()
        average.step()
        flat.step()
        losses(models["unet"], 2, 8, 128, 64, "cuda")
        models["unet"].eval()
        with torch.no_grad():
            losses(models["unet"], 2, 8, 128, 64, "cuda")
        flat.remove()
    return f"{done} backward passes by hand"


def rehearse_quantized(kind: str, noisy: bool) -> str:
    """A step on a base in 4 or 8 bits, by plain LoRA or by Flat-LoRA, and the UNet in `eval()`.

    The weights are quantised on the CPU: the tensors' own way to a card writes through `.data`.
    """
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(**TINY_UNET).requires_grad_(False).to(torch.bfloat16)
    quantize(unet, kind, torch.device("cpu"))
    compute_dequantized(unet)
    add_lora({"unet": unet}, rank=4, alpha=4, seed=0)
    with (
        without_a_driver(),
        mock.patch.object(quantized, "dequantize_bnb_weight", _dequantized),
        OwnFunctions() as functions,
    ):
        unet.to("cuda").train()
        flat = FlatLoRA(unet, sigma=0.1 * noisy, total_steps=9, schedule="constant")
        losses(unet, 2, 8, 128, 64, "cuda")
        done = functions.backward()
        flat.step()
        unet.eval()
        with torch.no_grad():
            losses(unet, 2, 8, 128, 64, "cuda")
        flat.remove()
    return f"{done} backward passes by hand"


def _dequantized(weight: Tensor, state: Any) -> Tensor:
    """As PEFT does it, which goes by the class of the parameter: fake tensors have but one."""
    if hasattr(weight, "quant_state"):
        return bnb.functional.dequantize_4bit(weight, weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(weight, weight.SCB)
