"""Last stage: a complete diffusers pipeline in float16, and a sheet of what it draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from micro_data import BASE_STYLES, caption
from micro_models import build_autoencoder, build_scheduler, build_unet
from micro_text import Captions, load_text
from PIL import Image

SHEET_SUBJECTS = (
    *("red apple", "banana", "hamburger", "grinning face", "dog face", "frog face"),
    *("rocket", "sunflower", "red heart", "wrapped present", "octopus", "fire engine"),
)


def export(work: Path, output: Path) -> None:
    """Write the running averages of all stages, finished or not, as a pipeline folder."""

    def average(name: str) -> dict[str, torch.Tensor]:
        return torch.load(work / f"{name}.ckpt", weights_only=True)["average"]

    tokenizer, text = load_text(work, Captions(work))
    autoencoder, unet = build_autoencoder(), build_unet()
    autoencoder.load_state_dict(average("autoencoder"))
    autoencoder.register_to_config(
        scaling_factor=torch.load(work / "latents.pt", weights_only=True)["scaling_factor"]
    )
    unet.load_state_dict(average("unet"))
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
    readme = (output / "README.md").read_bytes() if (output / "README.md").exists() else None
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    if readme is not None:
        (partial / "README.md").write_bytes(readme)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"[export] {output}: {size / 2**20:.1f} MiB", flush=True)


def draw_sheet(folder: Path, path: Path, guidance: float = 4.0, steps: int = 30) -> None:
    """Draw each of `SHEET_SUBJECTS` in each base style, one style a row, to judge the model by eye."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    scale = 2
    sheet = None
    for row, style in enumerate(BASE_STYLES):
        images = pipeline(
            [caption(style, subject) for subject in SHEET_SUBJECTS],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(row),
        ).images
        side = images[0].width * scale
        sheet = sheet or Image.new("RGB", (side * len(images), side * len(BASE_STYLES)), "white")
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (column * side, row * side))
    sheet.save(path)
    print(f"[export] {path}", flush=True)
