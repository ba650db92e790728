"""DreamBooth training of SDXL from a configuration: checks, then one run or two, then what follows."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.state import PartialState

from flatlora_diffusion.adapter.new_tokens import require_words
from flatlora_diffusion.common.command import hide_progress_bars
from flatlora_diffusion.common.devices import deterministic_algorithms, release
from flatlora_diffusion.common.lock import check_writable, output_lock
from flatlora_diffusion.common.memory import peak_memory
from flatlora_diffusion.config.contradictions import require_curve
from flatlora_diffusion.config.settings import FLAT, PLAIN, TrainConfig
from flatlora_diffusion.data.datasets import DatasetSource, dataset_samples
from flatlora_diffusion.data.encodings import Encodings, kept_folder
from flatlora_diffusion.data.folders import CAPTION_KEY
from flatlora_diffusion.data.images import Sample, find_samples, parse_background, require_transparency
from flatlora_diffusion.draw.pipeline import native_side_of
from flatlora_diffusion.output.folds import Folds, verdict
from flatlora_diffusion.output.gallery import SideBySide
from flatlora_diffusion.output.history import from_summary
from flatlora_diffusion.output.hub import open_repository
from flatlora_diffusion.output.names import ARMS, FOLDER
from flatlora_diffusion.sdxl.base import BASE_FLAG, check_base
from flatlora_diffusion.sdxl.quantize import require_bitsandbytes
from flatlora_diffusion.sdxl.size import SDXL_PARAMETERS, unet_parameters
from flatlora_diffusion.train import class_images
from flatlora_diffusion.train.afterwards import present, prompts_after
from flatlora_diffusion.train.callbacks import Callback, Callbacks
from flatlora_diffusion.train.folds import require_images, split, without_a_part
from flatlora_diffusion.train.loop import Run
from flatlora_diffusion.train.memory import GIB, room_on
from flatlora_diffusion.train.plan import ENCODED, TRIED, Trial, plan
from flatlora_diffusion.train.preset import Preset
from flatlora_diffusion.train.processes import from_main, join_processes, leave_processes
from flatlora_diffusion.train.tracking import Tracked, check_tracker

logger = logging.getLogger(__name__)


def train(config: TrainConfig, callbacks: Sequence[Callback] = (), preset: Preset | None = None) -> None:
    """Train as configured; with `compare`, plain LoRA and Flat-LoRA one after the other, and draw both.

    Leaves `pytorch_lora_weights.safetensors` and `summary.json` in the output folder (with `compare`, in
    `lora/` and `flat_lora/` inside it), `comparison.png` where there are prompts to draw, and a model card.

    Args:
        config: The settings.
        callbacks: Called by every run, in this order; they may also train in another way (`train.callbacks`).
        preset: Chooses the settings that it wasn't given, and writes them down.

    Raises:
        TypeError, ValueError: The callbacks are none, or don't go together. Nothing has been written.
        UserError: Bad input: nothing has been written, or what was there before is still there. Or something
            that follows training failed: what was trained has been saved.
        RunInterruptedError: A signal stopped the run after a checkpoint or the adapter was saved.
    """
    together = Callbacks([*callbacks, *([preset] if preset else [])])
    config, samples, heldout_samples = _checked(config, preset)
    arms = _arms(config)
    with contextlib.ExitStack() as locks:
        locks.enter_context(deterministic_algorithms(config.deterministic))

        def lock() -> None:
            for folder in dict.fromkeys([config.output_dir, *(arm.output_dir for arm in arms)]):
                locks.enter_context(output_lock(Path(folder)))

        from_main(lock)
        class_samples = class_images.class_samples(config) if config.with_prior_preservation else ()
        repository = from_main(lambda: open_repository(config)) if config.push_to_hub else None
        side_by_side = _side_by_side(config, arms)
        tracked = Tracked()
        folds: dict[str, Folds] = {}
        encodings = Encodings(kept_folder() if config.cache else None)
        for number, arm in enumerate(arms):
            tracked.finish()
            found = None
            if arm.folds:
                found = folds[arm.method] = _find_steps(arm, samples, class_samples, together, encodings)
                arm = arms[number] = dataclasses.replace(arm, use_ema=found.averaged)
            logger.info("%s: %d images, into %s", arm.method, len(samples), arm.output_dir)
            # No name keeps a run: what follows it needs the room of its models.
            tracked = Run(
                arm, samples, class_samples, heldout_samples, side_by_side, together, encodings, found
            ).train()
            release()
        if len(folds) > 1:
            logger.info("%s", verdict(folds))
        try:
            if PartialState().is_main_process:
                present(config, arms, samples, heldout_samples, side_by_side, repository, tracked)
        finally:
            tracked.finish()
        leave_processes()


def _find_steps(
    config: TrainConfig,
    samples: list[Sample],
    class_samples: Sequence[Sample],
    callbacks: Callbacks,
    encodings: Encodings,
) -> Folds:
    """Train the folds of an arm, or go on with them; their curves are written into its folder.

    Each trains as many steps as the arm has, with the same schedules. With `use_ema` they also say whether
    the average is better than the adapter itself.

    Raises:
        UserError: The held-out loss would be measured too seldom to see a curve, or as `Run.train`.
    """
    assert config.folds, "folds were asked for"
    total_steps = Run(config, samples, class_samples).total_steps
    require_curve(total_steps, config.heldout_steps)
    parts, histories = split(samples, config.folds, config.seed), []
    for number, (trained, heldout) in enumerate(parts, start=1):
        fold = without_a_part(config, number, total_steps)
        label = f"{config.method}, fold {number} of {config.folds}"
        told = (label, len(trained), len(heldout), fold.output_dir)
        logger.info("%s: %d images, %d held out, into %s", *told)
        Run(fold, trained, class_samples, heldout, None, callbacks, encodings, label=label).train().finish()
        release()
        histories.append(from_main(partial(from_summary, Path(fold.output_dir))))
    images = tuple(len(heldout) for _, heldout in parts)
    judged = Folds(total_steps, images, tuple(dict(own.heldout) for own in histories), config.use_ema)
    found = judged.or_better(Folds(total_steps, images, tuple(dict(own.heldout_live) for own in histories)))
    from_main(partial(found.write, Path(config.output_dir)))
    logger.info("%s", found.sentence(config.method))
    return found


def rehearse(config: TrainConfig, preset: Preset | None = None) -> str:
    """Take a few steps of what `train` would do, on a state that is thrown away; nothing is written.

    A few of the images are encoded for them; class images have training images in their place, and with
    folds a training image is measured for those that will be held out.

    Returns:
        The plan in lines; nothing in processes other than the main one.

    Raises:
        UserError: As `train`, or the steps need more memory than there is.
    """
    config, samples, heldout_samples = _checked(config, preset)
    count = undrawn = 0
    if config.with_prior_preservation:
        count = config.num_class_images
        undrawn = len(from_main(lambda: class_images.missing(config, Path(str(config.class_data_dir)))))
    class_samples = [samples[number % len(samples)] for number in range(count)]
    trials, prompts = [], tuple(prompts_after(config, samples))
    with deterministic_algorithms(config.deterministic):
        for arm in _arms(config):
            trials.append(_tried(arm, samples, class_samples, heldout_samples, prompts))
            release()
    told = ""
    if PartialState().is_main_process:
        told = plan(config, samples, heldout_samples, trials, len(prompts), undrawn)
    leave_processes()
    return told


def _tried(
    config: TrainConfig,
    samples: list[Sample],
    class_samples: list[Sample],
    heldout_samples: list[Sample],
    prompts: tuple[str, ...],
) -> Trial:
    drawn = dataclasses.replace(config, validation_prompt=prompts or None)
    run = Run(drawn, samples, class_samples, samples if config.folds else heldout_samples)
    if config.folds:
        require_curve(run.total_steps, config.heldout_steps)
    device = run.accelerator.device
    room, base = room_on(device), config.pretrained_model_name_or_path
    tried = run.try_steps(TRIED, ENCODED)
    return Trial(
        config,
        steps=run.total_steps,
        steps_an_epoch=run.steps_an_epoch,
        processes=run.accelerator.num_processes,
        tried=tried,
        peak=(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()) / GIB,
        share=unet_parameters(base, BASE_FLAG, config.revision) / SDXL_PARAMETERS,
        room=room,
    )


def _checked(config: TrainConfig, preset: Preset | None) -> tuple[TrainConfig, list[Sample], list[Sample]]:
    """The settings, all of them chosen, with the training images and those held out; nothing is written."""
    check_tracker(config.report_to)
    hide_progress_bars()
    join_processes()
    samples = _training_samples(config)
    if preset:
        config = preset.settled(config, samples)
    if config.train_text_encoder_ti:
        require_words(config.abstractions, samples)
    parse_background(config.background)
    if config.folds:
        require_images(config.folds, samples)
    if config.alpha_mask:
        require_transparency(samples)
    check_base(config.pretrained_model_name_or_path)
    config = _with_size_of_pictures(config)
    if config.quantize_base:
        require_bitsandbytes(config.quantize_base)
    check_writable("--output_dir", Path(config.output_dir))
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return config, samples, _heldout_samples(config)


def _with_size_of_pictures(config: TrainConfig) -> TrainConfig:
    """The settings with the base's own size for validation pictures, where none is given."""
    if config.validation_resolution:
        return config
    side = native_side_of(config.pretrained_model_name_or_path, BASE_FLAG, config.revision)
    return dataclasses.replace(config, validation_resolution=side)


def _training_samples(config: TrainConfig) -> list[Sample]:
    if config.dataset_name:
        return _dataset_samples(config, "train")
    return _folder_samples(config, "instance_data_dir")


def _heldout_samples(config: TrainConfig) -> list[Sample]:
    if config.heldout_split:
        return _dataset_samples(config, config.heldout_split)
    return _folder_samples(config, "heldout_data_dir") if config.heldout_data_dir else []


def _dataset_samples(config: TrainConfig, split: str) -> list[Sample]:
    assert config.dataset_name is not None, "its split was asked for"
    source = DatasetSource(
        config.dataset_name,
        config.dataset_config_name,
        config.cache_dir,
        config.image_column,
        config.caption_column,
    )
    return dataset_samples(source, split, config.instance_prompt)


def _folder_samples(config: TrainConfig, setting: str) -> list[Sample]:
    folder = getattr(config, setting)
    caption_key = config.caption_column or CAPTION_KEY
    return find_samples(
        Path(folder),
        config.instance_prompt,
        f"--{setting} {folder}",
        caption_key,
        kohya_folders=config.kohya_folders,
    )


def _arms(config: TrainConfig) -> list[TrainConfig]:
    """The runs to do: with `compare` a plain one and one with noise, equal in everything else."""
    if not config.compare:
        return [config]
    folders = {method: str(Path(config.output_dir, name)) for method, name in ARMS.items()}
    flat = dataclasses.replace(config, compare=False, output_dir=folders[FLAT])
    return [dataclasses.replace(flat, flat_sigma=0.0, output_dir=folders[PLAIN]), flat]


def _side_by_side(config: TrainConfig, arms: list[TrainConfig]) -> SideBySide | None:
    if not config.compare:
        return None
    galleries = {arm.method: Path(arm.output_dir, FOLDER) for arm in arms}
    return SideBySide(Path(config.output_dir, FOLDER), galleries)
