"""Stage two: tokenizer and text encoders, taught to say what the picture of a caption looks like.

Learning words and denoising at once binds colours to words only after hours. So the text encoders come first,
on a task of their own that needs no UNet: from the caption, predict the leading principal components of its
picture. Then they are frozen, and their outputs, which say shape and colour already, are computed once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from micro_data import BASE_STYLES, NEW_STYLE, caption, plain_caption
from micro_models import POOLED, WIDTHS, build_text_encoders, build_tokenizer, encode, tokenize
from micro_training import Stage, save_atomically
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

BATCH = 64
COMPONENTS = 256
PLAIN_SHARE = 0.08  # captions that name no style
FIRST_NAME_SHARE = 0.7  # captions that use the Unicode name where a subject has several


class Captions:
    """All captions of all subjects as rows of one list, and a sampler of rows."""

    def __init__(self, work: Path):
        subjects = json.loads((work / "subjects.json").read_text())
        self.texts: list[str] = []
        first = torch.zeros(len(BASE_STYLES) + 1, len(subjects), dtype=torch.long)
        for kind in range(len(BASE_STYLES) + 1):
            for index, subject in enumerate(subjects):
                first[kind, index] = len(self.texts)
                for name in subject["names"]:
                    plain = kind == len(BASE_STYLES)
                    self.texts.append(plain_caption(name) if plain else caption(BASE_STYLES[kind], name))
        self.first = first
        self.names = torch.tensor([len(subject["names"]) for subject in subjects])

    def sample(
        self, styles: torch.Tensor, subjects: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """One caption row for each picture (style index, subject index)."""
        draws = torch.rand(3, len(styles), generator=generator)
        kinds = torch.where(draws[0] < PLAIN_SHARE, len(BASE_STYLES), styles)
        names = (draws[1] * self.names[subjects]).long()
        names = torch.where(draws[2] < FIRST_NAME_SHARE, 0, names)
        return self.first[kinds, subjects] + names


def make_tokenizer(captions: Captions) -> CLIPTokenizer:
    """The tokenizer of both text encoders; the new style's word is one token that no training caption has."""
    return build_tokenizer(captions.texts, NEW_STYLE.split())


def build_text_modules(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The two text encoders, and the heads that only their training uses."""
    first, second = build_text_encoders(tokenizer)
    heads = {"head_one": nn.Linear(WIDTHS[0], COMPONENTS), "head_two": nn.Linear(POOLED, COMPONENTS)}
    return nn.ModuleDict({"one": first, "two": second, **heads})


def picture_components(latents: torch.Tensor) -> torch.Tensor:
    """Principal components (styles, n, COMPONENTS), half-way to equal variance so that details count."""
    flat = latents.flatten(0, 1).flatten(1)
    u, s, _ = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    scores = u[:, :COMPONENTS] * s[:COMPONENTS].sqrt()
    return (scores / scores.std()).unflatten(0, latents.shape[:2])


def _batches(
    captions: Captions, ids: torch.Tensor, draw: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Style indices, subject indices and token ids of batches, each with captions of about one length.

    Attention is causal, so padding after the end token can be cut off: it saves more than half of the work.
    """
    lengths = (ids != ids[0, -1]).sum(dim=1) + 1  # up to the first end token, which is also the padding
    while True:
        styles = torch.randint(len(BASE_STYLES), (8 * BATCH,), generator=draw)
        subjects = torch.randint(len(captions.names), (8 * BATCH,), generator=draw)
        rows = captions.sample(styles, subjects, draw)
        for part in lengths[rows].argsort().split(BATCH):
            yield styles[part], subjects[part], ids[rows[part], : lengths[rows[part]].max()]


def train_text(work: Path, minutes: float) -> None:
    """Train both text encoders on all captions."""
    torch.manual_seed(2)
    captions = Captions(work)
    tokenizer = make_tokenizer(captions)
    ids = tokenize(tokenizer, captions.texts)
    targets = picture_components(torch.load(work / "latents.pt", weights_only=True)["latents"])
    modules = build_text_modules(tokenizer)
    stage = Stage("text", modules, work, minutes, lr=1.5e-3, seed=3)
    encoders = (modules["one"], modules["two"])
    batches = _batches(captions, ids, stage.generator)
    for _ in stage.steps():
        styles, subjects, tokens = next(batches)
        _, pooled, first_pooled = encode(encoders, tokens)
        wanted = targets[styles, subjects]
        loss = F.mse_loss(modules["head_two"](pooled), wanted) + F.mse_loss(
            modules["head_one"](first_pooled), wanted
        )
        stage.update(loss)


def load_text(work: Path, captions: Captions) -> tuple[CLIPTokenizer, nn.ModuleDict]:
    """The tokenizer and the trained text encoders (running average)."""
    tokenizer = make_tokenizer(captions)
    modules = build_text_modules(tokenizer)
    modules.load_state_dict(torch.load(work / "text.ckpt", weights_only=True)["average"])
    return tokenizer, modules.eval()


@torch.no_grad()
def cache_embeddings(work: Path) -> None:
    """Write ``embeddings.pt``: context and pooled embedding of every caption row."""
    captions = Captions(work)
    tokenizer, modules = load_text(work, captions)
    targets = picture_components(torch.load(work / "latents.pt", weights_only=True)["latents"])
    contexts, pooled = [], []
    for ids in tokenize(tokenizer, captions.texts).split(256):
        context, embeds, _ = encode((modules["one"], modules["two"]), ids)
        contexts.append(context)
        pooled.append(embeds)
    contexts, pooled = torch.cat(contexts), torch.cat(pooled)
    save_atomically({"contexts": contexts, "pooled": pooled}, work / "embeddings.pt")

    # How often a caption's nearest picture, of all of its style, is its own.
    predicted = modules["head_two"](pooled[captions.first[: len(BASE_STYLES)]])
    hits = torch.cdist(predicted, targets).argmin(dim=-1) == torch.arange(targets.shape[1])
    explained = 1 - (predicted - targets).square().mean() / targets.var()
    print(
        f"[text] retrieval {hits.float().mean():.3f}, variance explained {explained:.3f}, "
        f"std of context {contexts.std():.2f}, of pooled {pooled.std():.2f}",
        flush=True,
    )
