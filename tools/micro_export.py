"""The trained parts as a diffusers pipeline and a CLIP: writing their folders, and going on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from micro_autoencoder import load_autoencoder
from micro_clip import SCALE, TOWER, load_tower
from micro_models import IMAGE_SIZE, build_scheduler, build_unet
from micro_text import load_text
from micro_training import read_progress, save_atomically
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

CARDS = Path(__file__).resolve().parent / "cards"
STAGES = ("autoencoder", "clip", "text", "unet")
PROGRESS = "training.json"


def assemble_pipeline(work: Path) -> StableDiffusionXLPipeline:
    """The running averages of all stages, finished or not, in half precision as they are shipped."""
    tokenizer, text = load_text(work)
    autoencoder, unet = load_autoencoder(work), build_unet()
    autoencoder.register_to_config(
        scaling_factor=torch.load(work / "latents.pt", weights_only=True)["scaling_factor"]
    )
    unet.load_state_dict(torch.load(work / "unet.ckpt", weights_only=True)["average"])
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text["one"],
        text_encoder_2=text["two"],
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
    tokenizer, text = load_text(work)
    vision, scale = load_tower(work)
    config = CLIPConfig(
        text_config=text["two"].config.to_dict(),
        vision_config=vision.config.to_dict(),
        projection_dim=vision.config.projection_dim,
    )
    model = CLIPModel(config)
    model.load_state_dict({**text["two"].state_dict(), **vision.state_dict(), "logit_scale": scale})
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model.half().eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def export(work: Path, assets: Path) -> None:
    """Write ``micro-sdxl`` and ``micro-clip`` as they are now, also in the middle of a stage.

    Each gets its model card if `score` has been run, and the pipeline gets ``sheet.png`` and the stages'
    progress, which `adopt` goes on from.

    Args:
        work: the folder of checkpoints, and of scores and the sheet.
        assets: the folder that holds both.
    """
    pipeline, clip = assets / "micro-sdxl.partial", assets / "micro-clip.partial"
    for partial in (pipeline, clip):
        shutil.rmtree(partial, ignore_errors=True)
    assemble_pipeline(work).save_pretrained(pipeline, safe_serialization=True)
    for part in assemble_clip(work):
        part.save_pretrained(clip)
    progress = {stage: read_progress(work, stage) for stage in STAGES}
    (pipeline / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n")
    scores = work / "scores.json"
    if scores.exists():
        shutil.copy(work / "sheet.png", pipeline / "sheet.png")
        facts = json.loads(scores.read_text())
        facts |= {
            "pipeline_megabytes": folder_size(pipeline) / 1e6,
            "clip_megabytes": folder_size(clip) / 1e6,
        }
        for partial in (pipeline, clip):
            card = (CARDS / f"{partial.stem}.md").read_text(encoding="utf-8")
            (partial / "README.md").write_text(card.format_map(facts), encoding="utf-8")
    for partial in (pipeline, clip):
        output = partial.with_suffix("")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
        print(f"[export] {output}: {folder_size(output) / 1e6:.1f} MB", flush=True)


def adopt(work: Path, assets: Path) -> None:
    """Write checkpoints that go on from what `export` wrote; stages that have a checkpoint stay as they are.

    An export has neither the optimizers' state nor what only training uses: ``clip`` and ``text`` are taken
    as finished; ``autoencoder`` and ``unet`` warm up again, if there are steps left.

    Args:
        work: the folder of checkpoints.
        assets: the folder that holds ``micro-sdxl`` and ``micro-clip``.
    """
    folder = assets / "micro-sdxl"
    one = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(assets / "micro-clip", dtype=torch.float32)
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    tower = {
        TOWER + name: tensor
        for name, tensor in clip.state_dict().items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    text = {f"one.{name}": tensor for name, tensor in one.state_dict().items()}
    text |= {f"two.{name}": tensor for name, tensor in two.state_dict().items()}
    averages = {
        "autoencoder": autoencoder.state_dict(),
        "clip": {**tower, SCALE: clip.logit_scale.detach()},
        "text": text,
        "unet": unet.state_dict(),
    }
    progress = json.loads((folder / PROGRESS).read_text())
    for stage, average in averages.items():
        path = work / f"{stage}.ckpt"
        if not path.exists():
            save_atomically({"average": average, **progress[stage]}, path)
