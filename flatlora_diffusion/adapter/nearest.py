"""The nearest plain LoRA of a given rank to an adapter's update: what every program reads alike.

The update of a layer is s*B@A. With DoRA it is the merged weight less the base's, `m * W' / ||W'|| - W` with
`W' = W + s*B@A`, where the norms are those of the filters or, as LyCORIS can have it, of the inputs. Its best
approximation of a rank keeps the greatest singular values (Eckart and Young).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from flatlora_diffusion.adapter.file import with_sorted_metadata
from flatlora_diffusion.adapter.kohya import kohya_metadata, to_kohya
from flatlora_diffusion.adapter.kohya_names import Layer
from flatlora_diffusion.adapter.layers import read_layers, to_diffusers
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.lora import TEXT_ENCODERS


def write_nearest(
    source: Path, target: Path, rank: int, base: str | None = None, layers_per_block: int = 2
) -> float:
    """Write the nearest plain LoRA to an adapter, in kohya's format.

    Args:
        source: In any format that is read. Its DoRA may be of the filters or of the inputs.
        target: Overwritten where it exists.
        rank: Of every layer; layers whose update has a lower one keep that.
        base: Folder or hub name of the base, whose weights a DoRA's update depends on.
        layers_per_block: Of the UNet; SDXL has 2.

    Returns:
        The relative error: the norm of what is lost, over that of the update, of all layers together.

    Raises:
        UserError: The source or the base can't be read, or don't fit each other.
    """
    # Magnitudes keep their shape, by which filters and inputs are told apart.
    adapter = read_layers(source, layers_per_block, stored_magnitudes=True)
    weight: Callable[[Layer], Tensor] | None = None
    lost = whole = 0.0
    try:
        if any("magnitude" in own for own in adapter.weights.values()):
            if base is None:
                raise UserError("its DoRA's update depends on the base's weights; give --base")
            weight = _weights(base)
        plain = {}
        for layer, own in adapter.weights.items():
            scale = adapter.scales[layer]
            if weight is None or "magnitude" not in own:
                factors = own["up"].float().flatten(1) * scale, own["down"].float().flatten(1)
            else:
                factors = _dora_update(layer, own, scale, weight(layer), adapter.format == "kohya"), None
            down, up, left, norm = truncated(*factors, rank)
            lost, whole = lost + left, whole + norm
            down = down.reshape(-1, *own["down"].shape[1:]).to(own["down"])
            up = up.reshape(*up.shape, *own["up"].shape[2:]).to(own["up"])
            plain[layer] = {"down": down, "up": up, "alpha": torch.tensor(float(len(down)))}
        tensors, configs = to_diffusers(plain)
        converted = to_kohya(tensors, configs, layers_per_block)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    metadata = {"format": "pt"} | kohya_metadata(converted)
    contiguous = {key: tensor.contiguous() for key, tensor in converted.items()}
    write_atomically(target, with_sorted_metadata(save(contiguous, metadata=metadata)))
    return math.sqrt(lost / whole) if whole else 0.0


def truncated(left: Tensor, right: Tensor | None, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of a matrix, of a rank.

    Args:
        left: The matrix (m, n) itself, or (m, r) where it is left @ right.
        right: (r, n), or None.
        rank: The greatest of the approximation.

    Returns:
        Down (k, n), up (m, k) for up @ down, and the squared norms of what is lost and of the whole.
    """
    if right is None:
        u, s, v = torch.linalg.svd(left, full_matrices=False)
    else:  # without forming the product
        q, core = torch.linalg.qr(left)
        p, other = torch.linalg.qr(right.T)
        u, s, v = torch.linalg.svd(core @ other.T, full_matrices=False)
        u, v = q @ u, v @ p.T
    root = s[:rank].sqrt()
    squares = s.double().square()
    return root[:, None] * v[:rank], u[:, :rank] * root, squares[rank:].sum().item(), squares.sum().item()


def _dora_update(
    layer: Layer, own: dict[str, Tensor], scale: float, weight: Tensor, of_kohya: bool
) -> Tensor:
    """What a DoRA adds to the base's weight, (out, in * height * width)."""
    down, up, magnitude = (own[kind].float() for kind in ("down", "up", "magnitude"))
    if weight.shape != (len(up), *down.shape[1:]):
        raise UserError(f"{'.'.join(layer)}: of another shape in the base; give the base it was trained on")
    merged = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    axis = 1 if of_kohya and magnitude.ndim > 1 and len(magnitude) == 1 < len(up) else 0
    if magnitude.numel() != weight.shape[axis]:
        raise UserError(
            f"{'.'.join(layer)}: DoRA of shape {list(magnitude.shape)} fits no axis of its weight"
        )
    others = [dim for dim in range(weight.ndim) if dim != axis]
    wanted = magnitude.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    norms = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    return (merged * (wanted / norms) - weight).flatten(1)


def _weights(name: str) -> Callable[[Layer], Tensor]:
    """A layer of a base -> its weight in float32."""
    base = load_base(name, flag="--base", to_draw=True)
    parts: dict[str, nn.Module] = {"unet": base.unet}
    parts |= dict(zip(TEXT_ENCODERS, base.text_encoders, strict=True))

    def weight(layer: Layer) -> Tensor:
        part, path = layer
        modules = dict(parts[part].named_modules())
        # Newer transformers dropped this level from CLIPTextModel.
        module = modules.get(path, modules.get(path.removeprefix("text_model.")))
        if module is None:
            raise UserError(f"{part}.{path}: isn't in the base {name}; give the one it was trained on")
        return weight_of(module).detach().float()

    return weight
