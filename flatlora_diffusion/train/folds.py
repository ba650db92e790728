"""Folds: where no image can be held out, runs without a part of them tell how many steps unseen ones like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import Sample
from flatlora_diffusion.output.names import FOLDS


def require_images(folds: int, samples: Sequence[Sample]) -> None:
    """Refuse more folds than there are images: each holds out one at least, and trains one at least.

    Raises:
        UserError: Says how many there may be.
    """
    count = len(samples)
    if folds > count:
        images = f"is only {count} image" if count == 1 else f"are only {count} images"
        most = f"give at most {count}" if count > 1 else "leave it out"
        raise UserError(f"--folds {folds}: there {images} to train; {most}")


def split(samples: Sequence[Sample], folds: int, seed: int) -> list[tuple[list[Sample], list[Sample]]]:
    """What each fold trains and what it holds out, both in the order in which they were.

    The images are shuffled, and dealt out to the folds one by one: which of them a fold holds out is a
    function of (seed, fold), and their numbers differ by one at most.
    """
    order: list[int] = torch.randperm(len(samples), generator=keyed_generator(seed, "folds")).tolist()
    parts = [set(order[fold::folds]) for fold in range(folds)]
    return [
        (
            [sample for index, sample in enumerate(samples) if index not in part],
            [sample for index, sample in enumerate(samples) if index in part],
        )
        for part in parts
    ]


def without_a_part(config: TrainConfig, number: int, total_steps: int) -> TrainConfig:
    """The settings of a fold: those of its run, into a folder of its own. Nothing is drawn.

    Args:
        config: Of the run.
        number: Of the fold, from 1.
        total_steps: Of the run: in an epoch of fewer images there would be fewer.
    """
    return dataclasses.replace(
        config,
        folds=None,
        output_dir=str(Path(config.output_dir, FOLDS, str(number))),
        max_train_steps=total_steps,
        validation_prompt=None,
        output_kohya_format=False,
    )
