"""Stage two: both text encoders, trained contrastively against one image tower, as CLIP was.

The tower and the second text encoder are a complete CLIP; the first text encoder is trained beside it with a
projection of its own. The next stage goes on with the text encoders; the tower stays as it is.

The tower alone also sees pictures in the new styles: two distorted views of each must find each other among
all pictures of the batch. No caption takes part, so the text encoders learn nothing of those styles, but
CLIP-I is fit to compare pictures in them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from micro_captions import Captions
from micro_data import load_icons, load_merges, to_pixels
from micro_models import (
    POOLED,
    WIDTHS,
    build_text_encoders,
    build_tokenizer,
    build_vision_tower,
    encode,
    tokenize,
)
from micro_subjects import BASE_STYLES, NEW_STYLES
from micro_training import Stage
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

PAIRS = 128  # of picture and caption in a batch
NEW_STYLE_PICTURES = 16
TOWER, SCALE = "vision.", "log_scales.1"  # names in the checkpoint


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer of both text encoders."""
    return build_tokenizer(load_merges(work))


def build_clip_modules(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Text encoders, tower, and what only the contrastive training uses."""
    first, second = build_text_encoders(tokenizer)
    return nn.ModuleDict(
        {
            "one": first,
            "two": second,
            "vision": build_vision_tower(),
            "head_one": nn.Linear(WIDTHS[0], POOLED, bias=False),
            "log_scales": nn.ParameterList([torch.tensor(2.7) for _ in range(2)]),
        }
    )


def distort(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move, scale, blur and re-colour pictures a little, so that a drawing of an icon is near the icon.

    Args:
        pixels: (n, 3, h, w) in -1 to 1.
        generator: the source of randomness, on the CPU.
    """
    n, device = len(pixels), pixels.device
    draws = torch.rand(n, 6, generator=generator).to(device)
    zoom = 1 + 0.24 * (draws[:, 0] - 0.5)
    shift = 0.24 * (draws[:, 1:3] - 0.5)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    # The background is white, so sampling outside must give white: shift the range, pad with zeros.
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    blur = (draws[:, 3] < 0.5).float() * draws[:, 4]
    mixed = torch.lerp(moved, blurred, blur.view(-1, 1, 1, 1))
    gain = 1 + 0.2 * (draws[:, 5] - 0.5)
    noise = torch.randn(mixed.shape, generator=generator).to(device)
    return ((mixed - 1) * gain.view(-1, 1, 1, 1) + 1 + 0.04 * noise).clamp(-1, 1)


def contrast(left: torch.Tensor, right: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each row's own column among all, and each column's own row."""
    logits = log_scale.exp().clamp(max=100) * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
    own = torch.arange(len(left), device=left.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(work: Path, steps: int, device: torch.device, lr: float = 2.5e-3) -> None:
    """Train text encoders and image tower."""
    torch.manual_seed(2)
    icons, tokenizer = load_icons(work), load_tokenizer(work)
    captions = Captions(icons.subjects, tokenizer)
    all_styles, all_subjects = icons.base_pairs()
    pictures = torch.stack([icons.images[style] for style in BASE_STYLES])
    new = torch.cat([icons.images[style][icons.free(style)] for style in NEW_STYLES])
    modules = build_clip_modules(tokenizer).to(device)
    stage = Stage("clip", modules, work, steps, lr=lr, seed=3)
    draw = stage.generator
    for _ in stage.steps():
        chosen = torch.randperm(len(all_styles), generator=draw)[:PAIRS]
        styles, subjects = all_styles[chosen], all_subjects[chosen]
        tokens = tokenize(tokenizer, captions.draw(styles, subjects, draw), cut=True).to(device)
        extra = new[torch.randperm(len(new), generator=draw)[:NEW_STYLE_PICTURES]]
        pixels = to_pixels(torch.cat([pictures[styles, subjects], extra, extra])).to(device)
        features = modules["vision"](pixel_values=distort(pixels, draw)).image_embeds
        shown, views = features[:PAIRS], F.normalize(features, dim=-1)
        _, second, first = encode((modules["one"], modules["two"]), tokens)
        scales = modules["log_scales"]
        loss = contrast(shown, modules["head_one"](first), scales[0])
        loss = loss + contrast(shown, second, scales[1])
        # Each view in a new style must find its twin among all other pictures.
        similar = 10 * views[PAIRS:] @ views.T
        index = torch.arange(2 * NEW_STYLE_PICTURES, device=device)
        similar[index, PAIRS + index] = -torch.inf
        twin = PAIRS + index.roll(NEW_STYLE_PICTURES)
        stage.update(loss + F.cross_entropy(similar, twin))


def load_clip(work: Path) -> nn.ModuleDict:
    """The trained modules (running average)."""
    modules = build_clip_modules(load_tokenizer(work))
    modules.load_state_dict(torch.load(work / "clip.ckpt", weights_only=True)["average"])
    return modules.eval()


def load_tower(work: Path) -> tuple[CLIPVisionModelWithProjection, torch.Tensor]:
    """The trained tower alone, and the logarithm of its scale against the second text encoder."""
    average = torch.load(work / "clip.ckpt", weights_only=True)["average"]
    tower = build_vision_tower()
    tower.load_state_dict(
        {name.removeprefix(TOWER): tensor for name, tensor in average.items() if name.startswith(TOWER)}
    )
    return tower.eval(), average[SCALE]


@torch.no_grad()
def image_features(vision: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Unit features (n, POOLED) of uint8 pictures (n, h, w, 3)."""
    parts = [vision(pixel_values=to_pixels(part)).image_embeds for part in images.split(256)]
    return F.normalize(torch.cat(parts), dim=-1)
