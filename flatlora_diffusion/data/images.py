"""Training images: folders, captions, transparency, crops and flips; and which sample comes at which step."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.data.buckets import bucket_sizes, nearest_size
from flatlora_diffusion.data.folders import CAPTION_KEY, read_folder

logger = logging.getLogger(__name__)

PROMPT_PLACEHOLDER = "{instance_prompt}"

# Images that don't fit are cached with this many crops when crops are random.
_RANDOM_CROPS = 4
# Transparent images are cached on this many colours when backgrounds are random.
_RANDOM_BACKGROUNDS = 4

# Images of extreme shape are cropped before they are resized: whole they would have more pixels than this.
_MOST_PIXELS = 2**26

RANDOM_BACKGROUND = "random"
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that is no file by itself, such as one in a row of a dataset. It stands where a path does.

    Attributes:
        name: Tells it from the other images, as a file's name does.
        where: Where it is, for errors.
        read_bytes: Gives the content of the image's file.
    """

    name: str
    where: str
    read_bytes: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Sample:
    """One training image and its caption, which an epoch sees `repeats` times."""

    path: Path | EmbeddedImage
    caption: str
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How images are made to fit: their size, their crops and flips, and what is under transparent parts.

    Attributes:
        resolution: Side of the square that they fill, in pixels.
        aspect_buckets: They keep about their shape instead, with an area of about resolution x resolution.
        center_crop: They are cropped in the centre, not at random.
        random_flip: They come mirrored too.
        interpolation: How they are resized: the name of one of Pillow's filters, in small letters.
        background: The RGB colour under transparent parts; None for random ones.
    """

    resolution: int
    aspect_buckets: bool = False
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    background: tuple[int, int, int] | None = WHITE

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (height, width) that images may have."""
        square = (self.resolution, self.resolution)
        return bucket_sizes(self.resolution) if self.aspect_buckets else [square]


@dataclass(frozen=True)
class Variant:
    """One way a training image is shown: a crop, mirrored or not, on some background.

    Attributes:
        pixels: (3, height, width), float32 in [-1, 1].
        original_size: (height, width) of the file's image.
        crop_top_left: (top, left) of the crop in the resized image.
        alpha: (height, width), float32 in [0, 1]: how opaque the image is; None where it is so throughout.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    alpha: Tensor | None = None


def find_samples(
    folder: Path,
    instance_prompt: str,
    flag: str | None = None,
    caption_key: str = CAPTION_KEY,
    *,
    kohya_folders: bool = False,
) -> list[Sample]:
    """The images of a folder with their captions, by name; see `data.folders`.

    The log says how many there are, where their captions are from, and what is passed over.

    Args:
        folder: Where the images are.
        instance_prompt: The caption of images without one.
        flag: How the user named the folder, for errors; --instance_data_dir by default.
        caption_key: What the captions are called in `metadata.jsonl` and `metadata.csv`.
        kohya_folders: Sub-folders such as `10_fox` are read too, with their repeats.

    Raises:
        UserError: A missing folder, no image, a damaged image or metadata file, a caption without its image.
    """
    flag = flag or f"--instance_data_dir {folder}"
    if not folder.is_dir():
        raise UserError(f"{flag}: {'not a folder' if folder.exists() else 'no such folder'}")
    contents = read_folder(folder, caption_key, kohya_folders=kohya_folders)
    if not contents.pictures:
        passed_over = f"; passed over: {contents.passed_over}" if contents.passed_over else ""
        raise UserError(f"{flag}: no image in it{passed_over}")
    samples = []
    for found in contents.pictures:
        open_image(found.path)  # a damaged file is reported before anything is loaded or written
        samples.append(Sample(found.path, complete_caption(found.caption, instance_prompt), found.repeats))
    logger.info("%s: %s", flag, contents.summary)
    if contents.passed_over:
        logger.info("passed over: %s", contents.passed_over)
    return samples


def complete_caption(caption: str | None, instance_prompt: str) -> str:
    """The caption with the instance prompt in its place: where it is named, or alone where there is none."""
    return (caption or instance_prompt).replace(PROMPT_PLACEHOLDER, instance_prompt)


def digest(samples: list[Sample]) -> str:
    """A hash of the images and captions: a resumed run must see the same data."""
    sha = hashlib.sha256()
    for sample in samples:
        repeats = [] if sample.repeats == 1 else [sample.repeats]
        sha.update(json.dumps([sample.path.name, sample.caption, *repeats]).encode())
        sha.update(hashlib.sha256(sample.path.read_bytes()).digest())
    return sha.hexdigest()


def parse_background(colour: str) -> tuple[int, int, int] | None:
    """An RGB colour from its name or #rrggbb; None for random colours.

    Raises:
        UserError: No such colour.
    """
    if colour == RANDOM_BACKGROUND:
        return None
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError as error:
        raise UserError(
            f"--background {colour}: not a colour; give a name such as white, #rrggbb, or {RANDOM_BACKGROUND}"
        ) from error


def composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in RGB, its transparent parts over the background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (*background, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets a background through."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # pyright: ignore[reportOperatorIssue]


def variants(sample: Sample, framing: Framing, seed: int) -> Iterator[Variant]:
    """All the ways in which a training image is shown; which of them a step sees is drawn anew each time.

    Of the framing's sizes the one is taken whose aspect ratio is nearest. The image is resized until it
    covers it, and what sticks out is cropped: around the centre, or at a few places that (seed, file name)
    decides. Without a background a transparent image comes on a few colours, which (seed, file name) decides
    too. Flips double the variants.
    """
    image = open_image(sample.path)
    original_size = (image.height, image.width)
    shown = nearest_size(original_size, framing.sizes)
    scale = max(to / side for to, side in zip(shown, original_size, strict=True))
    height, width = (max(to, round(side * scale)) for to, side in zip(shown, original_size, strict=True))
    spare_height, spare_width = height - shown[0], width - shown[1]
    if framing.center_crop or (spare_height == 0 and spare_width == 0):
        corners = [(round(spare_height / 2), round(spare_width / 2))]
    else:
        draw = keyed_generator(seed, "crop", sample.path.name)
        corners = [
            tuple(int(torch.randint(spare + 1, (), generator=draw)) for spare in (spare_height, spare_width))
            for _ in range(_RANDOM_CROPS)
        ]
    colours = [framing.background or WHITE]
    transparent = is_transparent(image)
    if framing.background is None and transparent:
        draw = keyed_generator(seed, "background", sample.path.name)
        colours = [tuple(c) for c in torch.randint(256, (_RANDOM_BACKGROUNDS, 3), generator=draw).tolist()]
    resample = Image.Resampling[framing.interpolation.upper()]

    def crops(whole: Image.Image) -> Iterator[Tensor]:
        """The values, 0 to 255, at each of the corners."""
        resized = None if width * height > _MOST_PIXELS else whole.resize((width, height), resample)
        for top, left in corners:
            box = (left, top, left + shown[1], top + shown[0])
            if resized:
                crop = resized.crop(box)
            else:  # the same pixels, but for the last bits of where they lie
                across, down = whole.width / width, whole.height / height
                place = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
                crop = whole.resize((shown[1], shown[0]), resample, _within(place, whole.size))
            yield torch.from_numpy(np.array(crop)).float()

    alphas: list[Tensor | None] = [None] * len(corners)
    if transparent:
        alphas = [values / 255 for values in crops(image.convert("RGBA").getchannel("A"))]
    for colour in colours:
        for (top, left), alpha, values in zip(corners, alphas, crops(composite(image, colour)), strict=True):
            pixels = values.permute(2, 0, 1) / 127.5 - 1
            yield Variant(pixels, original_size, (top, left), alpha)
            if framing.random_flip:
                mirrored = None if alpha is None else alpha.flip(1)
                yield Variant(pixels.flip(2), original_size, (top, spare_width - left), mirrored)


def require_transparency(samples: Iterable[Sample]) -> None:
    """Refuse to weigh the loss by alpha where no image has any.

    Raises:
        UserError: All images are opaque.
    """
    if not any(is_transparent(open_image(sample.path)) for sample in samples):
        raise UserError("--alpha_mask: no training image has transparent parts; leave it out")


def _within(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The box without what rounding has put beyond the image."""
    (left, top, right, bottom), (width, height) = box, size
    return min(left, width), min(top, height), min(right, width), min(bottom, height)


def sample_index(seed: int, position: int, count: int) -> int:
    """Which of `count` samples comes at a position of the endless stream: shuffled anew every epoch."""
    epoch, place = divmod(position, count)
    order = torch.randperm(count, generator=keyed_generator(seed, "epoch", epoch))
    return int(order[place])
