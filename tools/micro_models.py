"""The shapes of the micro SDXL: every part has the real class and block types, only the widths are small."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

IMAGE_SIZE = 128
LATENT_SIZE = 16
TOKENS = 24  # the longest captions are cut; 77 would triple the cost of cross-attention
MERGES = 12_000  # of CLIP's 48,894: the tables of all would make the tower thrice as large
WIDTHS = (128, 160)  # hidden sizes of the two text encoders
POOLED = 192
START, END = "<|startoftext|>", "<|endoftext|>"


def build_autoencoder() -> AutoencoderKL:
    """The autoencoder: 128 px to 16 x 16 x 4, SDXL's factor of 8; 1.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        # SDXL's VAE overflows in float16 and is upcast; this one is trained in float32 at tiny activations.
        force_upcast=False,
    )


def build_tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """CLIP's own byte-level BPE, cut after its most frequent merges; ids of tokens are CLIP's own.

    Args:
        merges: all of CLIP's, in their order.
    """
    merges = merges[:MERGES]
    # The order of CLIP's bytes: first those that print, each as itself, then the others.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [*map(chr, printed), *(chr(0x100 + i) for i in range(0x100 - len(printed)))]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two CLIP text encoders, three layers each; the second one gives the pooled embedding."""
    configs = [
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            max_position_embeddings=TOKENS,
            projection_dim=POOLED,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for width, activation in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def build_vision_tower() -> CLIPVisionModelWithProjection:
    """The image tower of the contrastive training: a ViT on patches of 16 pixels."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=16,
            hidden_size=160,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=5,
            projection_dim=POOLED,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """The UNet: SDXL's pattern (no attention at full size, transformers below), heads of 32."""
    widths = (64, 128, 256)
    time_ids_dim = 8
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(
            max(width // 32, 1) for width in widths
        ),  # the number of heads, despite its name
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        time_embedding_dim=256,  # four times the first width would be narrower than the pooled embedding
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids_dim,
        projection_class_embeddings_input_dim=POOLED + 6 * time_ids_dim,
        norm_num_groups=4,  # of 16 channels and more (SDXL has 10): smaller ones lose the scale of the input
    )
    start_as_copy(unet)
    return unet


@torch.no_grad()
def start_as_copy(unet: UNet2DConditionModel) -> None:
    """Let an untrained UNet predict that everything in its input is noise.

    Where noise is strong that is nearly right, and an error of the copy counts 1 / SNR times in the denoised
    picture: until the copy is exact, captions can't be learnt. So ``conv_in`` writes the input into all
    channels, with either sign; residual branches start at zero; the last block's shortcut lets these channels
    through; and ``conv_out`` takes differences, as ``silu(a) - silu(-a) = a``.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last = module.conv2
        elif isinstance(module, Transformer2DModel):
            last = module.proj_out
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    first, shortcut, final = unet.conv_in, unet.up_blocks[-1].resnets[-1].conv_shortcut, unet.conv_out
    inputs, width = first.in_channels, first.out_channels
    nn.init.zeros_(first.weight)
    shortcut.weight.mul_(0.1)
    final.weight.mul_(0.1)
    for layer in (first, shortcut, final):
        nn.init.zeros_(layer.bias)
    for channel in range(width):
        source, sign = channel % inputs, 1 - 2 * (channel // inputs % 2)
        first.weight[channel, source, 1, 1] = sign
        shortcut.weight[channel, channel - width, 0, 0] += 1  # the skip connection comes last
        final.weight[source, channel, 1, 1] += sign * 2 * inputs / width


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's scheduler and noise schedule."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], cut: bool = False) -> torch.Tensor:
    """Token ids (n, TOKENS), padded and cut as the pipeline does.

    Args:
        tokenizer: of both encoders.
        texts: the captions.
        cut: whether to leave off the padding after the longest text. Attention is causal, so nothing before
            it changes.
    """
    padding = "longest" if cut else "max_length"
    batch = tokenizer(texts, padding=padding, max_length=TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def encode(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What SDXL's pipeline feeds the UNet, and one more.

    Returns:
        The context (n, tokens, sum of WIDTHS), penultimate layers of both; the pooled embedding (n, POOLED)
        of the second; the pooled output of the first, which only the text encoders' own training uses.
    """
    first = encoders[0](ids, output_hidden_states=True)
    second = encoders[1](ids, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return context, second.text_embeds, first.pooler_output
