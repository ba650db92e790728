"""Last stages' common ground: the trained parts as a diffusers pipeline and a CLIP, and their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from micro_autoencoder import load_autoencoder
from micro_captions import Captions
from micro_clip import load_clip
from micro_data import load_icons
from micro_models import IMAGE_SIZE, build_scheduler, build_unet
from micro_text import load_text
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

CARDS = Path(__file__).resolve().parent / "cards"


def assemble_pipeline(work: Path) -> StableDiffusionXLPipeline:
    """The running averages of all stages, finished or not, in half precision as they are shipped."""
    tokenizer, modules = load_text(work, Captions(load_icons(work).subjects))
    autoencoder, unet = load_autoencoder(work), build_unet()
    autoencoder.register_to_config(
        scaling_factor=torch.load(work / "latents.pt", weights_only=True)["scaling_factor"]
    )
    unet.load_state_dict(torch.load(work / "unet.ckpt", weights_only=True)["average"])
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=modules["one"],
        text_encoder_2=modules["two"],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return pipeline.to(torch.float16)


def assemble_clip(work: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """The image tower with the second text encoder, which it was trained with, in half precision."""
    captions = Captions(load_icons(work).subjects)
    tokenizer, modules = load_text(work, captions)
    clip = load_clip(work, captions)[1]
    text, vision = modules["two"], clip["vision"]
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config=vision.config.to_dict(),
        projection_dim=vision.config.projection_dim,
    )
    model = CLIPModel(config)
    scale = clip["log_scales"][1].detach()
    model.load_state_dict({**text.state_dict(), **vision.state_dict(), "logit_scale": scale})
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model.half().eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def export(work: Path, assets: Path) -> None:
    """Write ``micro-sdxl`` and ``micro-clip`` with their model cards, filled in from ``scores.json``.

    Args:
        work: the folder of checkpoints, scores and the sheet.
        assets: the folder that holds both.
    """
    pipeline, clip = assets / "micro-sdxl.partial", assets / "micro-clip.partial"
    for partial in (pipeline, clip):
        shutil.rmtree(partial, ignore_errors=True)
    assemble_pipeline(work).save_pretrained(pipeline, safe_serialization=True)
    shutil.copy(work / "sheet.png", pipeline / "sheet.png")
    for part in assemble_clip(work):
        part.save_pretrained(clip)
    facts = json.loads((work / "scores.json").read_text(encoding="utf-8"))
    facts |= {"pipeline_megabytes": folder_size(pipeline) / 1e6, "clip_megabytes": folder_size(clip) / 1e6}
    for partial in (pipeline, clip):
        output = partial.with_suffix("")
        card = (CARDS / f"{output.name}.md").read_text(encoding="utf-8")
        (partial / "README.md").write_text(card.format_map(facts), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
        print(f"[export] {output}: {folder_size(output) / 1e6:.1f} MB", flush=True)
