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
from micro_captions import Captions
from micro_clip import image_features, load_clip
from micro_data import BASE_STYLES, DEMO_SUBJECTS, Icons, caption, load_icons
from micro_export import assemble_pipeline
from micro_text import score_retrieval
from micro_training import read_progress
from PIL import Image
from torch import nn

from flatlora_diffusion.sheet.layout import contact_sheet

SUBJECTS = 100
STEPS = 30
GUIDANCE = 3.0
SHEET_SUBJECTS = 12
SPEED_REPEATS = 5


def draw(pipeline: StableDiffusionXLPipeline, prompts: list[str], first_seed: int) -> list[Image.Image]:
    """Draw each prompt from a seed of its own: ``first_seed``, ``first_seed + 1``, ..."""
    images = []
    for start in range(0, len(prompts), 20):
        part = prompts[start : start + 20]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        images += pipeline(
            part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators
        ).images
    return images


def _to_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack(
        [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3) for image in images]
    )


def score_drawings(
    work: Path, pipeline: StableDiffusionXLPipeline, icons: Icons, subjects: torch.Tensor
) -> tuple[dict[str, float], dict[str, list[Image.Image]]]:
    """Draw ``subjects`` in every base style, and look up the nearest real icons by the image tower.

    Returns:
        Shares of drawings whose nearest icon of their style is the named subject (``top 1``), is among the
        five nearest (``top 5``), and whose nearest icon of any style has their style; and the drawings.
    """
    tower = load_clip(work, Captions(icons.subjects))[1]["vision"].half().float()
    real = torch.stack([image_features(tower, icons.images[style]) for style in BASE_STYLES])
    drawings, hits = {}, []
    for index, style in enumerate(BASE_STYLES):
        prompts = [caption(style, icons.subjects[row].name) for row in subjects]
        drawings[style] = draw(pipeline, prompts, first_seed=1000 * index)
        similar = torch.einsum("nd,smd->snm", image_features(tower, _to_tensor(drawings[style])), real)
        nearest = similar[index].topk(5, dim=1).indices == subjects[:, None]
        styles = similar.amax(dim=2).argmax(dim=0) == index
        hits.append(torch.stack([nearest[:, 0], nearest.any(dim=1), styles]))
    top1, top5, style = torch.cat(hits, dim=1).float().mean(dim=1).tolist()
    return {"top1": top1, "top5": top5, "style": style}, drawings


def draw_sheet(icons: Icons, subjects: torch.Tensor, drawings: dict[str, list[Image.Image]]) -> Image.Image:
    """The first scored subjects, each style's icon above its drawing."""
    shown = subjects[:SHEET_SUBJECTS]
    cells, rows = [], []
    for style in BASE_STYLES:
        cells.append([Image.fromarray(icons.images[style][row].numpy()) for row in shown])
        cells.append(drawings[style][:SHEET_SUBJECTS])
        rows += [f"{style}: the icon", f"{style}: drawn"]
    return contact_sheet(cells, columns=[icons.subjects[row].name for row in shown], rows=rows, cell_size=96)


def measure_seconds(pipeline: StableDiffusionXLPipeline) -> float:
    """The median time of one picture, in seconds."""
    times = []
    for _ in range(SPEED_REPEATS + 1):
        start = time.perf_counter()
        draw(pipeline, [caption(BASE_STYLES[0], DEMO_SUBJECTS[0])], 0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_facts(work: Path, subjects: int) -> dict[str, float]:
    """How long each stage was trained, and on how much."""
    facts: dict[str, float] = {"clip_pairs": micro_clip.PAIRS}
    for name, batch in (
        ("autoencoder", micro_autoencoder.BATCH),
        ("clip", micro_clip.PAIRS),
        ("text", micro_text.BATCH),
        ("unet", micro_unet.BATCH),
    ):
        steps, minutes = read_progress(work, name)
        facts |= {f"{name}_steps": steps, f"{name}_minutes": minutes, f"{name}_pictures": steps * batch}
    facts["unet_passes"] = facts["unet_pictures"] / (len(BASE_STYLES) * subjects)
    return facts


def _millions(*modules: nn.Module) -> float:
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6


def score(work: Path) -> None:
    """Print all scores; write ``scores.json`` and ``sheet.png`` into ``work``."""
    icons = load_icons(work)
    pipeline = assemble_pipeline(work).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    subjects = torch.randperm(len(icons.subjects), generator=torch.Generator().manual_seed(7))[:SUBJECTS]
    shares, drawings = score_drawings(work, pipeline, icons, subjects)
    draw_sheet(icons, subjects, drawings).save(work / "sheet.png", optimize=True)
    scores = {
        "guidance": GUIDANCE,
        "subjects": len(icons.subjects),
        "unet_subjects": SUBJECTS,
        "unet_prompts": SUBJECTS * len(BASE_STYLES),
        **{f"unet_{name}": share for name, share in shares.items()},
        **{f"autoencoder_{style.replace(' ', '_')}": psnr for style, psnr in score_autoencoder(work).items()},
        **score_retrieval(work),
        "seconds": measure_seconds(pipeline),
        **training_facts(work, len(icons.subjects)),
        "vae_parameters": _millions(pipeline.vae),
        "text_parameters": _millions(pipeline.text_encoder, pipeline.text_encoder_2),
        "unet_parameters": _millions(pipeline.unet),
    }
    for name, value in scores.items():
        print(f"[score] {name}: {value:.3f}" if isinstance(value, float) else f"[score] {name}: {value}")
    (work / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
