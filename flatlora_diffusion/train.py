"""DreamBooth training of SDXL from a configuration: checks, one run or two, and the comparison picture."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers.utils.logging import disable_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from flatlora_diffusion import data, hub, pivotal, prior, record, sdxl
from flatlora_diffusion.card import Exhibit, Making, comparison_exhibit, write_card
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.errors import RunInterruptedError, UserError
from flatlora_diffusion.gallery import FOLDER, SideBySide, footer, validation_drawing, validation_seeds
from flatlora_diffusion.generate import DTYPES, compare, load_pipeline, release, save_picture
from flatlora_diffusion.hf_dataset import dataset_samples
from flatlora_diffusion.launch import from_main, join_processes, leave_processes
from flatlora_diffusion.output_folder import check_writable, output_lock
from flatlora_diffusion.quantised import require_bitsandbytes
from flatlora_diffusion.run import Run

logger = logging.getLogger(__name__)

COMPARISON = "comparison.png"

_MOST_IN_STRIP = 64  # training images above the comparison


def train(config: TrainConfig) -> None:
    """Train as configured; with `compare`, plain LoRA and Flat-LoRA one after the other, and draw both.

    Leaves `pytorch_lora_weights.safetensors` and `summary.json` in the output folder (with `compare`, in
    `lora/` and `flat_lora/` inside it), `comparison.png` where there are prompts to draw, and a model card.

    Raises:
        UserError: Bad input: nothing has been written, or what was there before is still there. Or something
            that follows training failed: what was trained has been saved.
        RunInterruptedError: A signal stopped the run after a checkpoint or the adapter was saved.
    """
    disable_progress_bar()
    disable_transformers_progress_bar()
    join_processes(config)
    samples = _training_samples(config)
    if config.train_text_encoder_ti:
        pivotal.require_words(config, samples)
    data.parse_background(config.background)
    sdxl.check_base(config.pretrained_model_name_or_path)
    if config.quantize_base:
        require_bitsandbytes(config.quantize_base)
    check_writable("--output_dir", Path(config.output_dir))
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    heldout_samples = _heldout_samples(config)
    arms = _arms(config)
    with contextlib.ExitStack() as locks:

        def lock() -> None:
            for folder in dict.fromkeys([config.output_dir, *(arm.output_dir for arm in arms)]):
                locks.enter_context(output_lock(Path(folder)))

        from_main(lock)
        class_samples = prior.class_samples(config) if config.with_prior_preservation else ()
        repository = from_main(lambda: hub.open_repository(config)) if config.push_to_hub else None
        side_by_side = _side_by_side(config, arms)
        for arm in arms:
            logger.info("%s: %d images, into %s", record.method(arm), len(samples), arm.output_dir)
            Run(arm, samples, class_samples, heldout_samples, side_by_side).train()
            release()
        if PartialState().is_main_process:
            _present(config, arms, samples, side_by_side, repository)
        leave_processes()


def _training_samples(config: TrainConfig) -> list[data.Sample]:
    if config.dataset_name:
        return dataset_samples(config, "train")
    return _folder_samples(config, "instance_data_dir")


def _heldout_samples(config: TrainConfig) -> list[data.Sample]:
    if config.heldout_split:
        return dataset_samples(config, config.heldout_split)
    return _folder_samples(config, "heldout_data_dir") if config.heldout_data_dir else []


def _folder_samples(config: TrainConfig, setting: str) -> list[data.Sample]:
    folder = getattr(config, setting)
    caption_key = config.caption_column or data.CAPTION_KEY
    return data.find_samples(Path(folder), config.instance_prompt, f"--{setting} {folder}", caption_key)


def _arms(config: TrainConfig) -> list[TrainConfig]:
    """The runs to do: with `compare` a plain one and one with noise, equal in everything else."""
    if not config.compare:
        return [config]
    plain = dataclasses.replace(
        config, compare=False, flat_sigma=0.0, output_dir=str(Path(config.output_dir, "lora"))
    )
    flat = dataclasses.replace(config, compare=False, output_dir=str(Path(config.output_dir, "flat_lora")))
    return [plain, flat]


def _side_by_side(config: TrainConfig, arms: list[TrainConfig]) -> SideBySide | None:
    if not config.compare:
        return None
    galleries = {record.method(arm): Path(arm.output_dir, FOLDER) for arm in arms}
    return SideBySide(Path(config.output_dir, FOLDER), galleries)


def _present(
    config: TrainConfig,
    arms: list[TrainConfig],
    samples: list[data.Sample],
    side_by_side: SideBySide | None,
    repository: str | None,
) -> None:
    """Draw, describe and upload what was trained: each of these, whatever became of those before.

    Raises:
        UserError: One of them failed.
        RunInterruptedError: Ctrl-C.
    """
    adapters = {record.method(arm): Path(arm.output_dir) for arm in arms}
    saved = (
        f"what was trained is in {' and '.join(map(str, adapters.values()))}; "
        "with --resume_from_checkpoint latest the same command does only what follows training"
    )
    failures = []

    def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except torch.OutOfMemoryError:
            failures.append("out of memory while the comparison was drawn")
        except (UserError, OSError) as error:
            failures.append(str(error))
        except KeyboardInterrupt as stop:
            raise RunInterruptedError(f"interrupted; {saved}", signal.SIGINT) from stop
        return None

    if side_by_side:
        attempt(side_by_side.draw_missing)
    exhibit = None
    if config.compare or config.validation_prompt:
        exhibit = attempt(_draw_comparison, config, samples, adapters)
        release()
    state = AcceleratorState()
    making = Making(len(samples), state.num_processes, state.mixed_precision)
    if config.compare:
        for arm in arms:
            attempt(write_card, arm, {record.method(arm): Path(arm.output_dir)}, making)
    attempt(write_card, config, adapters, making, exhibit, repository)
    if repository:
        attempt(hub.upload, config, repository)
    if failures:
        raise UserError(f"{'; '.join(failures)} ({saved})")


def _draw_comparison(config: TrainConfig, samples: list[data.Sample], adapters: dict[str, Path]) -> Exhibit:
    """The base beside the adapters, loaded from disk as any user would load them."""
    output = Path(config.output_dir)
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    state = AcceleratorState()
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        device=state.device,
        dtype=DTYPES.get(state.mixed_precision, torch.float32),
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
    )
    sheet = compare(
        pipeline,
        adapters,
        config.validation_prompt or captions[:4],
        validation_seeds(config),
        validation_drawing(config),
        output / "comparison",
        title="The same prompt, seed and initial noise in every row",
        strip=[_picture_file(sample.path, output / "comparison") for sample in samples[:_MOST_IN_STRIP]],
        footer=footer(config, len(samples)),
    )
    save_picture(sheet, output / COMPARISON)
    logger.info("the comparison is in %s", output / COMPARISON)
    return comparison_exhibit(output / COMPARISON, output / "comparison")


def _picture_file(image: Path | data.EmbeddedImage, folder: Path) -> Path:
    """The file of a training image; one that isn't a file is written into the folder."""
    if isinstance(image, Path):
        return image
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{image.name}.png"
    data.composite(data.open_image(image), (255, 255, 255)).save(file)
    return file
