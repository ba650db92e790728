"""Scores: what the model card states, measured on the weights as they are shipped."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import micro_autoencoder
import micro_clip
import micro_text
import micro_unet
import torch
from diffusers import StableDiffusionXLPipeline
from micro_autoencoder import score_autoencoder
from micro_data import Icons, caption, load_icons, to_pixels
from micro_export import STAGES, assemble_pipeline
from micro_sheet import tile
from micro_subjects import BASE_STYLES, DEMO_SUBJECTS
from micro_text import score_retrieval
from micro_towers import Tower, independent_tower, own_tower
from micro_training import read_progress
from PIL import Image
from torch import nn

PROMPTS = 300
STEPS = 30
GUIDANCE = 2.0
UNKNOWN_STYLES = ("zorplin", "fluent 3d")  # the first means nothing, the second is to be taught
UNKNOWN_SUBJECTS = 60
SHEET_COLUMNS = 8
BLIND_PROMPTS = 40
SPEED_REPEATS = 5
BATCH = 20

Pairs = tuple[torch.Tensor, torch.Tensor]
"""Style and subject indices."""


def draw(pipeline: StableDiffusionXLPipeline, prompts: list[str], first_seed: int) -> torch.Tensor:
    """Draw each prompt from a seed of its own, ``first_seed + i``: uint8 (n, h, w, 3)."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        images = pipeline(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        parts.append((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous())
    return torch.cat(parts)


def choose_pairs(icons: Icons) -> Pairs:
    """`PROMPTS` random pictures, as many in each base style, the styles one after the other."""
    generator = torch.Generator().manual_seed(7)
    count = PROMPTS // len(BASE_STYLES)
    rows = [icons.has[style].nonzero().flatten() for style in BASE_STYLES]
    subjects = [row[torch.randperm(len(row), generator=generator)[:count]] for row in rows]
    styles = [torch.full_like(row, style) for style, row in enumerate(subjects)]
    return torch.cat(styles), torch.cat(subjects)


class Judge:
    """Compares pictures with all real icons of the base styles, by one tower."""

    def __init__(self, icons: Icons, tower: Tower):
        self.tower, self.count = tower, len(icons.subjects)
        self.styles, self.subjects = icons.base_pairs()
        images = torch.stack([icons.images[style] for style in BASE_STYLES])
        self.features = tower(images[self.styles, self.subjects])

    def shares(self, images: torch.Tensor, pairs: Pairs) -> dict[str, float]:
        """Shares of pictures that are taken for what they should be.

        Returns:
            Shares of pictures whose nearest icon of their style is the named subject (``top1``), is among
            the five nearest (``top5``), and whose nearest icon of any style has their style (``style``).
        """
        styles, subjects = pairs
        similar = self.tower(images) @ self.features.T
        style = self.styles[similar.argmax(dim=1)] == styles
        of_style = similar.masked_fill(self.styles[None] != styles[:, None], -2)
        nearest = self.subjects[of_style.topk(5, dim=1).indices] == subjects[:, None]
        shares = {"top1": nearest[:, 0], "top5": nearest.any(dim=1), "style": style}
        return {name: hits.float().mean().item() for name, hits in shares.items()}

    def subject_share(self, images: torch.Tensor, subjects: torch.Tensor) -> float:
        """The share of pictures whose nearest icon, of whatever style, shows the subject."""
        nearest = self.subjects[(self.tower(images) @ self.features.T).argmax(dim=1)]
        return (nearest == subjects).float().mean().item()


@torch.no_grad()
def through_autoencoder(pipeline: StableDiffusionXLPipeline, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder leaves of real icons: no drawing can be better."""
    parts = []
    for part in images.split(BATCH):
        decoded = pipeline.vae.decode(pipeline.vae.encode(to_pixels(part)).latent_dist.mode()).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts)


def score_drawings(
    pipeline: StableDiffusionXLPipeline, icons: Icons, judges: dict[str, Judge]
) -> tuple[dict[str, float], Image.Image]:
    """Draw the prompts, and judge the drawings, the icons themselves as decoded, and another style's icons.

    Returns:
        The shares, and a sheet of each style's first icons and drawings.
    """
    pairs = styles, subjects = choose_pairs(icons)
    names = [icons.subjects[row].name for row in subjects]
    prompts = [caption(BASE_STYLES[style], name) for style, name in zip(styles, names, strict=True)]
    drawn = draw(pipeline, prompts, first_seed=0)
    real = torch.stack(
        [icons.images[BASE_STYLES[style]][row] for style, row in zip(styles, subjects, strict=True)]
    )
    # A drawing of the same subject by other people: noto's, or twemoji's for noto. Both have every subject.
    others = torch.where(
        styles == BASE_STYLES.index("noto"), BASE_STYLES.index("twemoji"), BASE_STYLES.index("noto")
    )
    other = torch.stack(
        [icons.images[BASE_STYLES[style]][row] for style, row in zip(others, subjects, strict=True)]
    )
    scores = {}
    judged = {"unet": drawn, "decoded": through_autoencoder(pipeline, real), "other_style": other}
    for tower, judge in judges.items():
        for name, images in judged.items():
            shares = judge.shares(images, pairs)
            scores |= {f"{tower}_{name}_{share}": value for share, value in shares.items()}
    shown = [
        row for style in range(len(BASE_STYLES)) for row in (styles == style).nonzero()[:SHEET_COLUMNS, 0]
    ]
    pictures, texts = [], []
    for start in range(0, len(shown), SHEET_COLUMNS):
        part = shown[start : start + SHEET_COLUMNS]
        pictures += [Image.fromarray(images[row].numpy()) for images in (real, drawn) for row in part]
        texts += [f"{BASE_STYLES[styles[row]]}: the icon" for row in part] + [names[row] for row in part]
    return scores, tile(pictures, texts, SHEET_COLUMNS, 96)


def score_unknown_styles(
    pipeline: StableDiffusionXLPipeline, icons: Icons, judges: dict[str, Judge]
) -> dict[str, float]:
    """How often the subject is right where the caption names no style, and where it names an unknown one."""
    generator = torch.Generator().manual_seed(8)
    subjects = torch.randperm(len(icons.subjects), generator=generator)[:UNKNOWN_SUBJECTS]
    names = [icons.subjects[row].name for row in subjects]
    prompts = {"no style": [f"an icon of {name}" for name in names]}
    prompts |= {style: [caption(style, name) for name in names] for style in UNKNOWN_STYLES}
    scores = {}
    for style, texts in prompts.items():
        drawn = draw(pipeline, texts, first_seed=10_000)
        for tower, judge in judges.items():
            scores[f"{tower}_{style.replace(' ', '_')}"] = judge.subject_share(drawn, subjects)
    return scores


def draw_blind(pipeline: StableDiffusionXLPipeline, icons: Icons, work: Path) -> None:
    """Write ``blind.png``, numbered drawings of random prompts, and ``blind.txt``, what they should show."""
    styles, subjects = icons.base_pairs()
    chosen = torch.randperm(len(styles), generator=torch.Generator().manual_seed(9))[:BLIND_PROMPTS]
    pairs = zip(styles[chosen], subjects[chosen], strict=True)
    prompts = [caption(BASE_STYLES[style], icons.subjects[row].name) for style, row in pairs]
    pictures = [Image.fromarray(image.numpy()) for image in draw(pipeline, prompts, first_seed=20_000)]
    numbers = [str(index + 1) for index in range(len(pictures))]
    tile(pictures, numbers, SHEET_COLUMNS, 192).save(work / "blind.png", optimize=True)
    lines = [f"{number}: {prompt}\n" for number, prompt in zip(numbers, prompts, strict=True)]
    (work / "blind.txt").write_text("".join(lines))


def measure_seconds(pipeline: StableDiffusionXLPipeline) -> float:
    """The median time of one picture, in seconds."""
    times = []
    for _ in range(SPEED_REPEATS + 1):
        start = time.perf_counter()
        draw(pipeline, [caption(BASE_STYLES[0], DEMO_SUBJECTS[0])], 0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_facts(work: Path, icons: Icons) -> dict[str, float]:
    """How long each stage was trained, and on how much."""
    batches = {
        "autoencoder": micro_autoencoder.BATCH,
        "clip": micro_clip.PAIRS,
        "text": micro_text.BATCH,
        "unet": micro_unet.BATCH,
    }
    facts: dict[str, float] = {"clip_pairs": micro_clip.PAIRS}
    for name in STAGES:
        progress = read_progress(work, name)
        facts |= {f"{name}_steps": progress["step"], f"{name}_minutes": progress["seconds"] / 60}
        facts[f"{name}_pictures"] = progress["step"] * batches[name]
    facts["pictures"] = len(icons.base_pairs()[0])
    facts["unet_passes"] = facts["unet_pictures"] / facts["pictures"]
    return facts


def _millions(*modules: nn.Module) -> float:
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6


def score(work: Path) -> None:
    """Print all scores; write them and the sheets (`draw_blind`) into ``work``."""
    icons = load_icons(work)
    pipeline = assemble_pipeline(work).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judges = {"own": Judge(icons, own_tower(work)), "independent": Judge(icons, independent_tower())}
    shares, sheet = score_drawings(pipeline, icons, judges)
    sheet.save(work / "sheet.png", optimize=True)
    draw_blind(pipeline, icons, work)
    scores = {
        "guidance": GUIDANCE,
        "subjects": len(icons.subjects),
        "prompts": PROMPTS,
        "unknown_subjects": UNKNOWN_SUBJECTS,
        **shares,
        **score_unknown_styles(pipeline, icons, judges),
        **{f"autoencoder_{style.replace(' ', '_')}": psnr for style, psnr in score_autoencoder(work).items()},
        **score_retrieval(work),
        "seconds": measure_seconds(pipeline),
        **training_facts(work, icons),
        "vae_parameters": _millions(pipeline.vae),
        "text_parameters": _millions(pipeline.text_encoder, pipeline.text_encoder_2),
        "unet_parameters": _millions(pipeline.unet),
    }
    for name, value in scores.items():
        print(f"[score] {name}: {value:.3f}" if isinstance(value, float) else f"[score] {name}: {value}")
    (work / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
