"""Prior preservation (DreamBooth, arXiv 2208.12242, section 4.2): pictures of the class, given or drawn."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from flatlora_diffusion.common.devices import DTYPES, out_of_memory_as_error, release
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import check_writable
from flatlora_diffusion.common.pictures import open_image, save_picture
from flatlora_diffusion.common.processes import Processes, met, require_shared
from flatlora_diffusion.common.seeds import hash64
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.folders import read_folder
from flatlora_diffusion.data.images import Sample, find_samples
from flatlora_diffusion.draw.pipeline import Drawing, draw_batch, load_pipeline, native_side
from flatlora_diffusion.sdxl.base import BASE_FLAG

logger = logging.getLogger(__name__)


def class_samples(config: TrainConfig) -> list[Sample]:
    """The class images with their captions; the base draws those that the folder lacks.

    Several processes share them out; a picture is the same whichever draws it.

    Raises:
        UserError: The folder cannot be made or holds a damaged image, or isn't that of all processes.
    """
    assert config.class_data_dir is not None and config.class_prompt is not None, "settings are checked"
    folder = Path(config.class_data_dir)
    device = PartialState().device
    assert device is not None
    with met().together() as processes:
        numbers = processes.from_main(lambda: missing(config, folder))
        if numbers:
            with out_of_memory_as_error(
                f"while class images were drawn into {folder}: those that are there stay; lower "
                "--sample_batch_size or --class_resolution, or draw them with "
                "--prior_generation_precision fp16"
            ):
                _draw(config, folder, device, numbers, processes)
            release()
            if processes.is_main:
                gone = sum(not _class_image(folder, number).exists() for number in numbers)
                require_shared("class images", f"--class_data_dir {folder}", gone)
    flag = f"--class_data_dir {folder}"
    samples = find_samples(folder, config.class_prompt, flag, kohya_folders=config.kohya_folders)
    return samples[: config.num_class_images]


def missing(config: TrainConfig, folder: Path) -> list[int]:
    """Numbers of the class images to draw until there are enough; the folder need not be there yet.

    Raises:
        UserError: It is none, holds a damaged image, or can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--class_data_dir {folder}: not a folder")
    given = read_folder(folder, kohya_folders=config.kohya_folders).pictures if folder.is_dir() else []
    for found in given:
        open_image(found.path)  # a damaged one is reported before anything is drawn
    wanted = config.num_class_images - len(given)
    if wanted <= 0:
        return []
    check_writable("--class_data_dir", folder)
    return [n for n in range(config.num_class_images) if not _class_image(folder, n).exists()][:wanted]


def _draw(
    config: TrainConfig, folder: Path, device: torch.device, numbers: list[int], processes: Processes
) -> None:
    """Draw this process's share of these class images; each is a function of the seed and its number."""
    prompt = config.class_prompt
    assert prompt is not None, "settings are checked"
    default = "fp16" if device.type == "cuda" else "fp32"
    precision = config.prior_generation_precision or default
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        flag=BASE_FLAG,
        device=device,
        dtype=DTYPES["fp32" if precision == "no" else precision],
        vae=config.pretrained_vae_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class_data_dir {folder}: cannot be made ({error.strerror})") from error
    side = config.class_resolution or native_side(pipeline)
    drawing = Drawing(side, side, caption_chunks=config.caption_chunks)
    together = f", {processes.count} processes together" if processes.count > 1 else ""
    logger.info("drawing %d class images into %s%s", len(numbers), folder, together)
    size = config.sample_batch_size
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    with tqdm(
        total=len(batches), desc="class images", unit="batch", disable=not processes.is_main
    ) as progress:
        for batch in processes.turns(batches):
            seeds = [hash64(config.seed, "class image", number) for number in batch or ()]
            pictures = (
                draw_batch(pipeline, None, [(prompt, seed) for seed in seeds], drawing) if batch else []
            )
            for number, picture in zip(batch or (), pictures, strict=True):
                save_picture(picture, _class_image(folder, number))
            progress.update(sum(processes.gather(int(batch is not None))))


def _class_image(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"
