"""Stage three: the text encoders also learn what the picture of a caption looks like.

Contrastive features tell pictures apart, but little of a picture can be read from them: the UNet would have
to learn each picture by heart. So both text encoders are trained on, towards two ends: the caption's features
stay nearest to those of its picture (the tower is frozen), and the leading principal components of the
picture can be read from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from micro_captions import Captions
from micro_clip import contrast, image_features, load_clip, load_tokenizer, load_tower
from micro_data import Icons, caption, load_icons, load_subjects, to_pixels
from micro_models import POOLED, WIDTHS, build_text_encoders, encode, tokenize
from micro_subjects import BASE_STYLES
from micro_training import Stage
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BATCH = 128
CHOICES = 4  # batches of about one length that a draw is split into
COMPONENTS = 256
COMPONENT_SIZE = 32  # pixels a side that pictures are scaled down to for their components
RETRIEVAL_POOL = 500


def build_text_modules(clip: nn.ModuleDict) -> nn.ModuleDict:
    """The text encoders with their contrastive head, and the heads that read the picture's components."""
    parts = {name: clip[name] for name in ("one", "two", "head_one")}
    readers = {"read_one": nn.Linear(WIDTHS[0], COMPONENTS), "read_two": nn.Linear(POOLED, COMPONENTS)}
    return nn.ModuleDict({**parts, **readers})


def picture_components(images: torch.Tensor) -> torch.Tensor:
    """Principal components (n, COMPONENTS) of uint8 pictures.

    They are half-way to equal variance, so that details count.
    """
    small = torch.cat([F.adaptive_avg_pool2d(to_pixels(part), COMPONENT_SIZE) for part in images.split(256)])
    flat = small.flatten(1)
    u, s, _ = torch.pca_lowrank(flat, q=min(COMPONENTS + 64, *flat.shape), niter=4)
    scores = F.pad(u * s.sqrt(), (0, COMPONENTS))[:, :COMPONENTS]
    return scores / scores.std()


def train_text(work: Path, steps: int, device: torch.device, lr: float = 1.5e-3) -> None:
    """Train both text encoders on all captions, starting from the contrastive ones."""
    torch.manual_seed(6)
    icons = load_icons(work)
    tokenizer, clip = load_tokenizer(work), load_clip(work)
    captions = Captions(icons.subjects, tokenizer)
    styles, subjects = icons.base_pairs()
    images = torch.stack([icons.images[style] for style in BASE_STYLES])[styles, subjects]
    pictures, components = image_features(clip["vision"], images), picture_components(images)
    modules = build_text_modules(clip).to(device).train().requires_grad_(True)
    scales = [scale.detach().to(device) for scale in clip["log_scales"]]
    stage = Stage("text", modules, work, steps, lr=lr, seed=7)
    draw, end = stage.generator, tokenizer.pad_token_id
    for _ in stage.steps():
        chosen = torch.randperm(len(images), generator=draw)[: CHOICES * BATCH]
        ids = tokenize(tokenizer, captions.draw(styles[chosen], subjects[chosen], draw))
        lengths = (ids != end).sum(dim=1) + 1  # with the end token, which is also the padding
        part = lengths.argsort(stable=True).chunk(CHOICES)[torch.randint(CHOICES, (), generator=draw)]
        chosen, tokens = chosen[part], ids[part, : lengths[part].max()]
        _, second, first = encode((modules["one"], modules["two"]), tokens.to(device))
        features, wanted = pictures[chosen].to(device), components[chosen].to(device)
        loss = contrast(features, modules["head_one"](first), scales[0])
        loss = loss + contrast(features, second, scales[1])
        loss = loss + F.mse_loss(modules["read_one"](first), wanted)
        stage.update(loss + F.mse_loss(modules["read_two"](second), wanted))
    share = explained_share(stage.average, icons, tokenizer, components)
    print(f"[text] {share:.0%} of the components' variance can be read from the pooled embedding", flush=True)


@torch.no_grad()
def explained_share(
    modules: nn.ModuleDict, icons: Icons, tokenizer: CLIPTokenizer, components: torch.Tensor
) -> float:
    """The share of the components' variance that the second encoder's pooled embedding tells."""
    pairs = zip(*(index.tolist() for index in icons.base_pairs()), strict=True)
    texts = [caption(BASE_STYLES[style], icons.subjects[subject].name) for style, subject in pairs]
    device = next(modules.parameters()).device
    errors = []
    for ids, wanted in zip(tokenize(tokenizer, texts).split(256), components.split(256), strict=True):
        pooled = encode((modules["one"], modules["two"]), ids.to(device))[1]
        errors.append((modules["read_two"](pooled).cpu() - wanted).square())
    return 1 - (torch.cat(errors).mean() / components.var()).item()


@torch.no_grad()
def load_text(work: Path) -> tuple[CLIPTokenizer, nn.ModuleDict]:
    """The tokenizer and the trained text encoders ``one`` and ``two`` (running average).

    Their context is brought to the size that SDXL's has: as they are trained it is some ten times larger,
    which the UNet's attention would start out saturated by.
    """
    tokenizer = load_tokenizer(work)
    modules = nn.ModuleDict(dict(zip(("one", "two"), build_text_encoders(tokenizer), strict=True)))
    average = torch.load(work / "text.ckpt", weights_only=True)["average"]
    modules.load_state_dict(
        {name: tensor for name, tensor in average.items() if name.startswith(("one.", "two."))}
    )
    modules.eval()
    texts = [caption(style, subject.name) for style in BASE_STYLES for subject in load_subjects(work)[::30]]
    ids = tokenize(tokenizer, texts)
    read = torch.arange(ids.shape[1]) <= (ids != tokenizer.pad_token_id).sum(dim=1, keepdim=True)
    for encoder in modules.values():
        context = encoder(ids, output_hidden_states=True).hidden_states[-2]
        scale_context(encoder, 1 / context[read].square().mean().sqrt().item())
    return tokenizer, modules


def scale_context(encoder: CLIPTextModel | CLIPTextModelWithProjection, factor: float) -> None:
    """Multiply every hidden state by ``factor``; what the encoder gives after its last norm stays the same.

    Each layer reads the hidden state through a norm, so that only what is added to it has to be scaled.
    """
    for name, parameter in encoder.named_parameters():
        if any(part in name for part in ("embedding.", "self_attn.out_proj.", "mlp.fc2.")):
            parameter.mul_(factor)


@torch.no_grad()
def score_retrieval(work: Path) -> dict[str, float]:
    """How often a picture is among the five nearest of its caption, out of 500 pairs, and the reverse."""
    icons = load_icons(work)
    vision, _ = load_tower(work)
    tokenizer, modules = load_text(work)
    styles, subjects = icons.base_pairs()
    chosen = torch.randperm(len(styles), generator=torch.Generator().manual_seed(11))[:RETRIEVAL_POOL]
    styles, subjects = styles[chosen], subjects[chosen]
    pictures = image_features(
        vision,
        torch.stack([icons.images[BASE_STYLES[s]][row] for s, row in zip(styles, subjects, strict=True)]),
    )
    texts = [
        caption(BASE_STYLES[s], icons.subjects[row].name) for s, row in zip(styles, subjects, strict=True)
    ]
    second = encode((modules["one"], modules["two"]), tokenize(tokenizer, texts))[1]
    similar, own = F.normalize(second, dim=-1) @ pictures.T, torch.arange(len(texts))[:, None]
    return {"caption_to_icon": _top(similar, own), "icon_to_caption": _top(similar.T, own)}


def _top(similar: torch.Tensor, own: torch.Tensor, k: int = 5) -> float:
    return (similar.topk(k, dim=1).indices == own).any(dim=1).float().mean().item()
