"""What to measure a training step on: models with LoRA, each with the loss of one fixed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.bases import PROMPT_TOKENS, SDXL
from benchmarks.common import DEMO_BASE, RANK, TARGETS, dtype_name
from flatlora_diffusion.sdxl.lora import TEXT_ENCODER_TARGETS

WIDTH = SDXL.unet["block_out_channels"][-1]
CONTEXT_WIDTH = SDXL.unet["cross_attention_dim"]
HEAD_WIDTH = 64

Predict = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Output of a UNet, or of blocks of one, for a fixed noisy input: (model, tokens' and pooled embeddings)."""


@dataclass
class Case:
    """Something to train.

    Attributes:
        name: What reports call it.
        model: With LoRA layers; its other weights are frozen.
        loss: That of one fixed batch, of this model or a copy of it.
        perturbed: Name of the submodule whose merged weights an arm may move; all of the model by default.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    perturbed: str = ""


class Stack(nn.Module):
    """Transformer blocks of SDXL's widest level, one after the other.

    Args:
        layers: Number of blocks.
        checkpointing: Compute their activations again in the backward pass.
        width: Of the hidden states.
        context_width: Of the prompts' embeddings.
        projections: Have a linear layer before the blocks and one after them, as a UNet has.
    """

    def __init__(
        self,
        layers: int,
        checkpointing: bool,
        width: int = WIDTH,
        context_width: int = CONTEXT_WIDTH,
        projections: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim=width,
                num_attention_heads=width // HEAD_WIDTH,
                attention_head_dim=HEAD_WIDTH,
                cross_attention_dim=context_width,
                activation_fn="geglu",
            )
            for _ in range(layers)
        )
        self.proj_in = nn.Linear(width, width) if projections else nn.Identity()
        self.proj_out = nn.Linear(width, width) if projections else nn.Identity()

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """Run the blocks on hidden states (batch, tokens, width) and a context (batch, length, its width)."""
        hidden_states = self.proj_in(hidden_states)
        for block in self.blocks:
            if self.checkpointing:
                hidden_states = checkpoint(block, hidden_states, None, context, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, encoder_hidden_states=context)
        return self.proj_out(hidden_states)


class WithTextEncoders(nn.Module):
    """A UNet, or blocks of one, and the two text encoders that embed its prompts in every step."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = unet, text_encoder, text_encoder_2

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts (batch, length), as `sdxl.encoding.encode_prompts` takes them."""
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return tokens, outputs[1].text_embeds


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision as the trainer has it: half-precision base, float32 adapter."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def with_lora(model: nn.Module, rank: int = RANK, targets: Sequence[str] = TARGETS) -> nn.Module:
    """Freeze the model and give it a float32 LoRA; its B is not zero, as it is only before the first step."""
    model.requires_grad_(False).train()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def cached_prompts_case(
    name: str,
    model: nn.Module,
    predict: Predict,
    widths: tuple[int, int],
    batch: int = 1,
    rank: int = RANK,
    targets: Sequence[str] = TARGETS,
) -> Case:
    """The text encoders' embeddings of the prompts are kept: only the UNet, or its blocks, are trained.

    Args:
        name: What reports call it.
        model: The UNet or its blocks.
        predict: Its output.
        widths: Of the tokens' and of the pooled embeddings.
        batch: Number of prompts.
        rank: Of the LoRA.
        targets: The layers that get one.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    tokens = torch.randn(batch, PROMPT_TOKENS, widths[0]).to(device, dtype)
    pooled = torch.randn(batch, widths[1]).to(device, dtype)

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, dtype):
            return predict(model, tokens, pooled).float().square().mean()

    return Case(name, with_lora(model, rank, targets), loss)


def text_encoders_case(
    name: str,
    model: WithTextEncoders,
    predict: Predict,
    perturb_text_encoders: bool = True,
    batch: int = 1,
) -> Case:
    """The text encoders are trained too, with LoRA on their attention; perturbed or not."""
    parameter = next(model.unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    config = model.text_encoder.config
    ids = torch.randint(config.vocab_size, (batch, config.max_position_embeddings)).to(device)

    def loss(model: WithTextEncoders) -> Tensor:
        with autocast(device, dtype):
            return predict(model.unet, *model.encode(ids)).float().square().mean()

    model = with_lora(model, targets=[*TARGETS, *TEXT_ENCODER_TARGETS])
    return Case(name, model, loss, "" if perturb_text_encoders else "unet")


def predict_of_unet(
    unet: UNet2DConditionModel, side: int | None = None, batch: int = 1
) -> tuple[Predict, tuple[int, int]]:
    """Noisy latents for a UNet of the SDXL kind; the widths of the embeddings that it takes.

    Args:
        unet: The UNet.
        side: Height and width of the latents; those that the UNet was made for by default.
        batch: Number of images.
    """
    config, device, dtype = unet.config, unet.device, unet.dtype
    side = side or config.sample_size
    time_ids = torch.tensor([[8.0 * side] * 2 + [0.0] * 2 + [8.0 * side] * 2] * batch)
    pooled = config.projection_class_embeddings_input_dim - time_ids.shape[1] * config.addition_time_embed_dim
    sample = torch.randn(batch, config.in_channels, side, side).to(device, dtype)
    time_ids = time_ids.to(device, dtype)
    timestep = torch.tensor([500], device=device)

    def predict(unet: nn.Module, tokens: Tensor, pooled: Tensor) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return unet(sample, timestep, tokens, added_cond_kwargs=conditions, return_dict=False)[0]

    return predict, (config.cross_attention_dim, pooled)


def predict_of_stack(
    stack: Stack, tokens: int, width: int = WIDTH, context_width: int = CONTEXT_WIDTH
) -> tuple[Predict, tuple[int, int]]:
    """Hidden states (1, tokens, width) for a stack; the widths of the embeddings that it takes."""
    parameter = next(stack.parameters())
    hidden_states = torch.randn(1, tokens, width).to(parameter.device, parameter.dtype)

    def predict(stack: nn.Module, context: Tensor, pooled: Tensor) -> Tensor:
        return stack(hidden_states, context)

    return predict, (context_width, 0)  # the blocks take no pooled embeddings


def demo_unet(device: torch.device) -> UNet2DConditionModel:
    """That of the demo base that the repository ships, in float32."""
    return UNet2DConditionModel.from_pretrained(DEMO_BASE, subfolder="unet").to(device)


def demo_case(device: torch.device) -> Case:
    """(a) The demo base that the repository ships, in float32."""
    unet = demo_unet(device)
    side = unet.config.sample_size
    name = f"(a) demo UNet, fp32, {device.type.upper()}, batch 1, {side} x {side} latents"
    return cached_prompts_case(name, unet, *predict_of_unet(unet))


def stack_case(
    layers: int, tokens: int, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> Case:
    """(b) Transformer blocks of SDXL at their real widths, batch 1."""
    stack = Stack(layers, checkpointing).to(device, dtype)
    name = (
        f"(b) {layers} SDXL transformer blocks of width {WIDTH}, {dtype_name(dtype)}, {device.type.upper()}, "
        f"{tokens} tokens, gradient checkpointing {'on' if checkpointing else 'off'}"
    )
    return cached_prompts_case(name, stack, *predict_of_stack(stack, tokens))


def sdxl_case(checkpointing: bool) -> Case:
    """(c) The whole SDXL UNet on a GPU, random weights in bf16, batch 1."""
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**SDXL.unet).to(torch.bfloat16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    name = (
        "(c) SDXL UNet, bf16, GPU, batch 1, 128 x 128 latents, "
        f"gradient checkpointing {'on' if checkpointing else 'off'}"
    )
    return cached_prompts_case(name, unet, *predict_of_unet(unet))


def host_case(device: torch.device) -> Case:
    """(d) Blocks so small that a step is the host's work alone: calls, autograd, what a step prepares."""
    width, context_width, tokens = HEAD_WIDTH, HEAD_WIDTH, 4
    stack = Stack(8, False, width, context_width).to(device)
    name = (
        f"(d) host time: 8 transformer blocks of width {width}, fp32, {device.type.upper()}, {tokens} tokens"
    )
    return cached_prompts_case(name, stack, *predict_of_stack(stack, tokens, width, context_width))
