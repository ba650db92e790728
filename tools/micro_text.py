"""Stage three: the text encoders also learn what the picture of a caption looks like.

Contrastive features tell pictures apart, but little of a picture can be read from them: the UNet would have
to learn each picture by heart. So both text encoders are trained on, towards two ends: the caption's features
stay nearest to those of its picture (the tower is frozen), and the leading principal components of the
picture's latents can be read from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from micro_captions import Captions
from micro_clip import contrast, image_features, load_clip, make_tokenizer
from micro_data import BASE_STYLES, load_icons
from micro_models import POOLED, WIDTHS, encode, tokenize
from micro_training import Stage, save_atomically
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

BATCH = 128
COMPONENTS = 256
RETRIEVAL_POOL = 500


def build_text_modules(clip: nn.ModuleDict) -> nn.ModuleDict:
    """The text encoders with their contrastive head, and the heads that read the picture's components."""
    parts = {name: clip[name] for name in ("one", "two", "head_one")}
    readers = {"read_one": nn.Linear(WIDTHS[0], COMPONENTS), "read_two": nn.Linear(POOLED, COMPONENTS)}
    return nn.ModuleDict({**parts, **readers})


def picture_components(latents: torch.Tensor) -> torch.Tensor:
    """Principal components (styles, n, COMPONENTS), half-way to equal variance so that details count."""
    flat = latents.flatten(0, 1).flatten(1)
    u, s, _ = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    scores = u[:, :COMPONENTS] * s[:COMPONENTS].sqrt()
    return (scores / scores.std()).unflatten(0, latents.shape[:2])


def _batches(
    captions: Captions, ids: torch.Tensor, pad: int, draw: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Style indices, subject indices and token ids of batches of different pictures, of about one length.

    Attention is causal, so padding after the longest caption can be cut off: it saves half of the work.
    """
    lengths = (ids != pad).sum(dim=1) + 1  # with the end token, which is also the padding
    subjects = captions.first.shape[1]
    while True:
        order = torch.randperm(len(BASE_STYLES) * subjects, generator=draw)
        style, subject = order // subjects, order % subjects
        rows = captions.sample(style, subject, draw)
        by_length = lengths[rows].argsort(stable=True)
        parts = by_length[: len(by_length) // BATCH * BATCH].split(BATCH)
        for index in torch.randperm(len(parts), generator=draw):
            part = parts[index]
            yield style[part], subject[part], ids[rows[part], : lengths[rows[part]].max()]


def train_text(work: Path, steps: int, device: torch.device, lr: float = 1.5e-3) -> None:
    """Train both text encoders on all captions, starting from the contrastive ones."""
    torch.manual_seed(6)
    icons = load_icons(work)
    captions = Captions(icons.subjects)
    tokenizer, clip = load_clip(work, captions)
    ids = tokenize(tokenizer, captions.texts)
    pictures = torch.stack([image_features(clip["vision"], icons.images[style]) for style in BASE_STYLES])
    components = picture_components(torch.load(work / "latents.pt", weights_only=True)["latents"])
    modules = build_text_modules(clip).to(device).train().requires_grad_(True)
    scales = [scale.detach().to(device) for scale in clip["log_scales"]]
    stage = Stage("text", modules, work, steps, lr=lr, seed=7)
    batches = _batches(captions, ids, tokenizer.pad_token_id, stage.generator)
    for _ in stage.steps():
        styles, subjects, tokens = next(batches)
        _, second, first = encode((modules["one"], modules["two"]), tokens.to(device))
        features = pictures[styles, subjects].to(device)
        loss = contrast(features, modules["head_one"](first), scales[0])
        loss = loss + contrast(features, second, scales[1])
        wanted = components[styles, subjects].to(device)
        loss = loss + F.mse_loss(modules["read_one"](first), wanted)
        stage.update(loss + F.mse_loss(modules["read_two"](second), wanted))


def load_text(work: Path, captions: Captions) -> tuple[CLIPTokenizer, nn.ModuleDict]:
    """The tokenizer and the trained modules (running average)."""
    modules = build_text_modules(load_clip(work, captions)[1])
    modules.load_state_dict(torch.load(work / "text.ckpt", weights_only=True)["average"])
    return make_tokenizer(captions), modules.eval()


@torch.no_grad()
def cache_embeddings(work: Path) -> None:
    """Write ``embeddings.pt``: context (half precision) and pooled embedding of every caption row."""
    captions = Captions(load_icons(work).subjects)
    tokenizer, modules = load_text(work, captions)
    contexts, pooled = [], []
    for ids in tokenize(tokenizer, captions.texts).split(256):
        context, embeds, _ = encode((modules["one"], modules["two"]), ids)
        contexts.append(context.half())
        pooled.append(embeds)
    contexts, pooled = torch.cat(contexts), torch.cat(pooled)
    save_atomically({"contexts": contexts, "pooled": pooled}, work / "embeddings.pt")
    components = picture_components(torch.load(work / "latents.pt", weights_only=True)["latents"])
    read = modules["read_two"](pooled[captions.first[: len(BASE_STYLES)]])
    explained = 1 - (read - components).square().mean() / components.var()
    print(
        f"[text] std of context {contexts.float().std():.2f}, of pooled {pooled.std():.2f}; "
        f"{explained:.0%} of the components' variance can be read from the pooled embedding",
        flush=True,
    )


@torch.no_grad()
def score_retrieval(work: Path) -> dict[str, float]:
    """How often a picture is among the five nearest of its caption, out of 500 pairs, and the reverse."""
    icons = load_icons(work)
    captions = Captions(icons.subjects)
    vision = load_clip(work, captions)[1]["vision"]
    tokenizer, modules = load_text(work, captions)
    count = len(icons.subjects)
    draw = torch.Generator().manual_seed(11)
    chosen = torch.randperm(len(BASE_STYLES) * count, generator=draw)[:RETRIEVAL_POOL]
    styles, subjects = chosen // count, chosen % count
    flat = torch.stack([icons.images[style] for style in BASE_STYLES])
    pictures = image_features(vision, flat[styles, subjects])
    ids = tokenize(tokenizer, [captions.texts[row] for row in captions.first[styles, subjects]])
    _, second, first = encode((modules["one"], modules["two"]), ids)
    scores = {}
    for name, texts in (("text_encoder", modules["head_one"](first)), ("text_encoder_2", second)):
        similar = F.normalize(texts, dim=-1) @ pictures.T
        own = torch.arange(RETRIEVAL_POOL)[:, None]
        scores[f"{name}_to_icon"] = _top(similar, own)
        scores[f"icon_to_{name}"] = _top(similar.T, own)
    return scores


def _top(similar: torch.Tensor, own: torch.Tensor, k: int = 5) -> float:
    return (similar.topk(k, dim=1).indices == own).any(dim=1).float().mean().item()
