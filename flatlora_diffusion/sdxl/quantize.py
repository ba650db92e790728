"""The UNet's frozen weights in 4 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flatlora_diffusion.common.extras import import_extra


def require_bitsandbytes(kind: str) -> Any:
    """The package bitsandbytes.

    Raises:
        UserError: It is not installed.
    """
    return import_extra("bitsandbytes", f"--quantize_base {kind}")


def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """Put layers of bitsandbytes in the place of all linear layers of a frozen model, one after the other.

    They hold the very bits that `from_pretrained(quantization_config=BitsAndBytesConfig(...))` of diffusers
    gives, which refuses to work without a GPU. PEFT and accelerate see that the model is quantised.

    Args:
        model: Its linear layers' weights are in the precision in which the layers will compute.
        kind: `4bit`: NF4 with double quantisation, as QLoRA (arXiv 2305.14314) has it. `8bit`: LLM.int8()
            (arXiv 2208.07339) with its usual threshold for outliers.
        device: Where the weights are quantised and stay. What is not quantised is not moved.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    make = {"4bit": _linear_4bit, "8bit": _linear_8bit}[kind]
    bnb = require_bitsandbytes(kind)
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                quantized = make(bnb, linear, device)
                quantized.bias = linear.bias
                setattr(parent, name, quantized.requires_grad_(False).train(linear.training))
    setattr(model, f"is_loaded_in_{kind}", True)  # PEFT goes by it


def _linear_4bit(bnb: Any, linear: nn.Linear, device: torch.device) -> nn.Linear:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to(device)
    # On processors with AVX512-BF16 an eval() pass would repack the weight, for good and without gradients.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _linear_8bit(bnb: Any, linear: nn.Linear, device: torch.device) -> nn.Linear:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=6.0,  # of transformers and diffusers, and of the paper
        device="meta",
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False).to(device)
    return layer
