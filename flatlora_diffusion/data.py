"""Icon folders: images, captions, transparency, crops and flips; and which sample belongs to which step."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from flatlora_diffusion.buckets import nearest_size
from flatlora_diffusion.errors import UserError
from flatlora_diffusion.noise import hash64

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"
PROMPT_PLACEHOLDER = "{instance_prompt}"

# Images that don't fit are cached with this many crops when crops are random.
_RANDOM_CROPS = 4


@dataclass(frozen=True)
class Sample:
    """One training image and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Variant:
    """One way a training image is shown: a crop, mirrored or not.

    Attributes:
        pixels: (3, height, width), float32 in [-1, 1].
        original_size: (height, width) of the file's image.
        crop_top_left: (top, left) of the crop in the resized image.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def image_files(folder: Path) -> set[Path]:
    """The files of a folder that are images by their names."""
    return {p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")}


def find_samples(folder: Path, instance_prompt: str, flag: str | None = None) -> list[Sample]:
    """The images of a folder with their captions, by name.

    Captions come from `metadata.jsonl` (lines with file_name and text), else from a `.txt` file beside the
    image, else the instance prompt stands in. Files that aren't images are passed over.

    Args:
        folder: Where the images are.
        instance_prompt: The caption of images without one.
        flag: How the user named the folder, for errors; --instance_data_dir by default.

    Raises:
        UserError: A missing folder, no image, a damaged image or metadata file, a caption without its image.
    """
    flag = flag or f"--instance_data_dir {folder}"
    if not folder.is_dir():
        raise UserError(f"{flag}: {'not a folder' if folder.exists() else 'no such folder'}")
    captions = _read_metadata(folder / METADATA)
    paths = sorted(image_files(folder) | captions.keys())
    if not paths:
        raise UserError(f"{flag}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    samples = []
    for path in paths:
        open_image(path)  # a damaged file is reported before anything is loaded or written
        caption = captions.get(path) or _read_sidecar(path.with_suffix(".txt")) or instance_prompt
        samples.append(Sample(path, caption.replace(PROMPT_PLACEHOLDER, instance_prompt)))
    return samples


def digest(samples: list[Sample]) -> str:
    """A hash of the images and captions: a resumed run must see the same data."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(json.dumps([sample.path.name, sample.caption]).encode())
        sha.update(hashlib.sha256(sample.path.read_bytes()).digest())
    return sha.hexdigest()


def open_image(path: Path) -> Image.Image:
    """An image, decoded in full and turned as its EXIF data says.

    Raises:
        UserError: The file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); mend or remove it") from error


def parse_background(colour: str) -> tuple[int, int, int]:
    """An RGB colour from its name or #rrggbb.

    Raises:
        UserError: No such colour.
    """
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError as error:
        raise UserError(
            f"--background {colour}: not a colour; give a name such as white, or #rrggbb"
        ) from error


def composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in RGB, its transparent parts over the background."""
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = image.point(lambda value: value / 256, "L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (*background, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def variants(
    sample: Sample,
    *,
    sizes: Sequence[tuple[int, int]],
    center_crop: bool,
    random_flip: bool,
    interpolation: str,
    background: tuple[int, int, int],
    seed: int,
) -> Iterator[Variant]:
    """All the ways in which a training image is shown; which of them a step sees is drawn anew each time.

    Of the sizes (height, width) the one is taken whose aspect ratio is nearest. The image is resized until it
    covers it, and what sticks out is cropped: around the centre, or at a few places that (seed, file name)
    decides. Flips double the variants.
    """
    image = composite(open_image(sample.path), background)
    original_size = (image.height, image.width)
    shown = nearest_size(original_size, sizes)
    scale = max(to / side for to, side in zip(shown, original_size, strict=True))
    height, width = (max(to, round(side * scale)) for to, side in zip(shown, original_size, strict=True))
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    spare_height, spare_width = height - shown[0], width - shown[1]
    if center_crop or (spare_height == 0 and spare_width == 0):
        corners = [(round(spare_height / 2), round(spare_width / 2))]
    else:
        draw = keyed_generator(seed, "crop", sample.path.name)
        corners = [
            tuple(int(torch.randint(spare + 1, (), generator=draw)) for spare in (spare_height, spare_width))
            for _ in range(_RANDOM_CROPS)
        ]
    for top, left in corners:
        crop = image.crop((left, top, left + shown[1], top + shown[0]))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1
        yield Variant(pixels, original_size, (top, left))
        if random_flip:
            yield Variant(pixels.flip(2), original_size, (top, spare_width - left))


def sample_index(seed: int, position: int, count: int) -> int:
    """Which of `count` samples comes at a position of the endless stream: shuffled anew every epoch."""
    epoch, place = divmod(position, count)
    order = torch.randperm(count, generator=keyed_generator(seed, "epoch", epoch))
    return int(order[place])


def keyed_generator(*key: object) -> torch.Generator:
    """A private generator on the CPU whose numbers depend on the key alone."""
    return torch.Generator().manual_seed(hash64(*key))


def _read_metadata(path: Path) -> dict[Path, str]:
    if not path.exists():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: must be {{"file_name": "...", "text": "..."}}'
            ) from error
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(f"{path}, line {number}: file_name and text must both be strings")
        image = path.parent / name
        if not image.is_file():
            raise UserError(f"{path}, line {number}: there is no image {name} beside it")
        captions[image] = text.strip()
    return captions


def _read_sidecar(path: Path) -> str | None:
    return _read_text(path).strip() if path.is_file() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
