"""Which LoRA layers can be perturbed: those whose merged weight is known here."""

from __future__ import annotations

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear, LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from torch import nn

from flatlora_diffusion.flat.noisy_base import Base
from flatlora_diffusion.flat.quantized import is_of_bitsandbytes, is_quantized

_DORA_VARIANTS = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_PEFT_ON_BITSANDBYTES = "peft.tuners.lora.bnb"  # not imported here: it would import bitsandbytes
_BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def supported_base(name: str, layer: LoraLayer) -> Base:
    """The layer under the adapter, where its merged weight is known here.

    Args:
        name: Qualified name of the layer, for messages.
        layer: A LoRA layer of PEFT.

    Raises:
        ValueError: It is not; the message names the problem and says what to do.
    """
    base = layer.get_base_layer()
    quantized = is_of_bitsandbytes(base)
    known = isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d, SVDLinear))
    if not known and type(layer).__module__ != _PEFT_ON_BITSANDBYTES:
        problem = f"a {type(layer).__module__}.{type(layer).__qualname__} adapter"
    elif quantized and not is_quantized(base):
        problem = f"a {type(base).__qualname__} whose weight isn't quantised (yet: .to(device) does it)"
    elif not isinstance(base, _BASES) or not (quantized or type(base) in _BASES):
        problem = f"a base layer of type {type(base).__qualname__}"
    elif getattr(layer, "fan_in_fan_out", False):
        problem = "fan_in_fan_out=True"
    elif base.weight.is_meta:
        problem = "a base weight that is offloaded (on the meta device)"
    elif base.weight.requires_grad:
        problem = "a base weight that is trained too (requires_grad=True)"
    elif not quantized and not base.weight.is_floating_point():
        problem = f"a base weight of dtype {base.weight.dtype}"
    elif getattr(base, "groups", 1) != 1 or getattr(base, "padding_mode", "zeros") != "zeros":
        problem = f"a convolution with groups={base.groups}, padding_mode={base.padding_mode!r}"
    elif isinstance(getattr(base, "padding", 0), str):
        problem = f"a convolution with padding={base.padding!r}"
    else:
        variants = [v for v in layer.lora_variant.values() if not isinstance(v, _DORA_VARIANTS)]
        if not variants:
            return base
        problem = f"the LoRA variant {type(variants[0]).__qualname__}"
    raise ValueError(
        f"{name}: Flat-LoRA cannot perturb {problem}; remove this layer from the adapter's target_modules"
    )
