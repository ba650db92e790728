"""Bases with random weights to measure on, and how their parts share the arithmetic of a training step.

`MIDSIZE` is SDXL at half the resolution, with about a quarter of every width (so that tokens and widths, and
with them attention and matrix products, keep their proportion) and half the layers of the deepest level. VAE,
text encoders and UNet then keep theirs; in TFLOP for one image, counted by `step_flops`:

| | VAE encode | text encoders | UNet forward + backward | VAE / UNet | text / UNet | UNet / all |
|---|--:|--:|--:|--:|--:|--:|
| SDXL at 1024 px | 4.88 | 0.111 | 14.10 | 0.346 | 0.0079 | 0.739 |
| the same, gradient checkpointing | 4.88 | 0.111 | 19.21 | 0.254 | 0.0058 | 0.794 |
| `MIDSIZE` at 512 px | 0.077 | 0.0019 | 0.222 | 0.345 | 0.0084 | 0.739 |

What perturbing a weight costs, beside the products with it, falls with the number of tokens: that part of
Flat-LoRA's cost is four times what it would be at 1024 px.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.common import DEMO_BASE, RANK, TARGETS

PROMPT_TOKENS = 77  # CLIP's longest prompt


@dataclass(frozen=True)
class Sizes:
    """Settings of an SDXL pipeline's models, and the resolution at which it is trained, in pixels."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]
    resolution: int

    @classmethod
    def of(cls, folder: Path, resolution: int) -> Sizes:
        """Those of a pipeline's folder."""
        parts = [field.name for field in fields(cls) if field.name != "resolution"]
        settings = {part: json.loads((folder / part / "config.json").read_text("utf-8")) for part in parts}
        public = {
            part: {key: value for key, value in values.items() if not key.startswith("_")}
            for part, values in settings.items()
        }
        return cls(**public, resolution=resolution)


@dataclass(frozen=True)
class Parts:
    """An SDXL pipeline's models."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one training step with one image, by part."""

    vae: int
    text_encoders: int
    unet: int

    def shares(self) -> dict[str, float]:
        """Each part's share of all."""
        total = self.vae + self.text_encoders + self.unet
        return {part: flops / total for part, flops in vars(self).items()}


# stabilityai/stable-diffusion-xl-base-1.0
SDXL = Sizes(
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    text_encoder={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
    },
    text_encoder_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
    },
    resolution=1024,
)

MIDSIZE = Sizes(
    unet=SDXL.unet
    | {
        "sample_size": 64,
        "block_out_channels": (96, 192, 384),
        "transformer_layers_per_block": (1, 2, 5),
        "attention_head_dim": (3, 3, 6),
        "cross_attention_dim": 512,
        "projection_class_embeddings_input_dim": 1856,
    },
    vae=SDXL.vae | {"block_out_channels": (32, 64, 128, 128), "sample_size": 512},
    text_encoder=SDXL.text_encoder
    | {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "projection_dim": 192,
    },
    text_encoder_2=SDXL.text_encoder_2
    | {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_attention_heads": 5,
        "num_hidden_layers": 8,
        "projection_dim": 320,
    },
    resolution=512,
)


def build(sizes: Sizes, device: torch.device | str = "cpu", **token_ids: int) -> Parts:
    """The models with random weights, the same for every call; the global RNG is left as it was.

    Args:
        sizes: Their settings.
        device: Where they are made; "meta" makes their shapes only.
        token_ids: `bos_token_id` and the like of the tokenizer, for the text encoders.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return Parts(
            UNet2DConditionModel(**sizes.unet),
            AutoencoderKL(**sizes.vae),
            CLIPTextModel(CLIPTextConfig(**sizes.text_encoder, **token_ids)),
            CLIPTextModelWithProjection(CLIPTextConfig(**sizes.text_encoder_2, **token_ids)),
        )


def write_base(sizes: Sizes, folder: Path, device: torch.device | str = "cpu") -> None:
    """Write a pipeline with random weights in half precision, as SDXL's fp16 files are.

    Its tokenizers are the demo base's, with SDXL's prompts of 77 tokens.
    """
    one, two = (
        CLIPTokenizer.from_pretrained(DEMO_BASE / name, model_max_length=PROMPT_TOKENS)
        for name in ("tokenizer", "tokenizer_2")
    )
    parts = build(
        sizes,
        device,
        bos_token_id=one.bos_token_id,
        eos_token_id=one.eos_token_id,
        pad_token_id=one.pad_token_id,
    )
    pipeline = StableDiffusionXLPipeline(
        **vars(parts),
        tokenizer=one,
        tokenizer_2=two,
        scheduler=EulerDiscreteScheduler.from_pretrained(DEMO_BASE, subfolder="scheduler"),
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def step_flops(sizes: Sizes, *, gradient_checkpointing: bool = False) -> StepFlops:
    """Count the arithmetic of one LoRA training step with one image, without doing it."""
    parts = build(sizes, "meta")
    for part in vars(parts).values():
        part.requires_grad_(False)
    parts.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    parts.unet.to("meta").train()
    if gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    size = sizes.resolution
    latent_size = size // 2 ** (len(sizes.vae["block_out_channels"]) - 1)
    length = sizes.text_encoder.get("max_position_embeddings", PROMPT_TOKENS)
    with torch.device("meta"):
        pixels = torch.empty(1, 3, size, size)
        tokens = torch.empty(1, length, dtype=torch.long)
        inputs = (
            torch.empty(1, 4, latent_size, latent_size),
            torch.empty(1, dtype=torch.long),
            torch.empty(1, length, sizes.unet["cross_attention_dim"]),
        )
        pooled = torch.empty(1, sizes.text_encoder_2["projection_dim"])
        conditions = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}

    def encode_prompt() -> None:
        parts.text_encoder(tokens)
        parts.text_encoder_2(tokens)

    def train_step() -> None:
        predicted = parts.unet(*inputs, added_cond_kwargs=conditions).sample
        predicted.square().mean().backward()

    return StepFlops(
        vae=_flops_of(lambda: parts.vae.encode(pixels)),
        text_encoders=_flops_of(encode_prompt),
        unet=_flops_of(train_step),
    )


def _flops_of(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
