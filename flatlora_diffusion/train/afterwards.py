"""What follows training: the comparison picture, model cards, the upload."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from flatlora_diffusion.common.devices import DTYPES, release
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.common.pictures import open_image, save_picture
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import EmbeddedImage, Sample, composite
from flatlora_diffusion.draw.pipeline import adapter_names
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.grid.draw import draw_grid
from flatlora_diffusion.grid.plan import Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.output.card import Exhibit, Making, comparison_exhibit, write_card
from flatlora_diffusion.output.gallery import SideBySide, footer, validation_drawing, validation_seeds
from flatlora_diffusion.output.hub import upload
from flatlora_diffusion.output.names import COMPARISON

logger = logging.getLogger(__name__)


MOST_IN_STRIP = 64  # training images above the comparison


def present(
    config: TrainConfig,
    arms: list[TrainConfig],
    samples: list[Sample],
    side_by_side: SideBySide | None,
    repository: str | None,
) -> None:
    """Draw, describe and upload what was trained: each of these, whatever became of those before.

    Raises:
        UserError: One of them failed.
        RunInterruptedError: Ctrl-C.
    """
    adapters = {arm.method: Path(arm.output_dir) for arm in arms}
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
            attempt(write_card, arm, {arm.method: Path(arm.output_dir)}, making)
    attempt(write_card, config, adapters, making, exhibit, repository)
    if repository:
        attempt(upload, config, repository)
    if failures:
        raise UserError(f"{'; '.join(failures)} ({saved})")


def _draw_comparison(config: TrainConfig, samples: list[Sample], adapters: dict[str, Path]) -> Exhibit:
    """The base beside the adapters, loaded from disk as any user would load them."""
    output = Path(config.output_dir)
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    prompts = list(dict.fromkeys(config.validation_prompt or captions[:4]))
    names = adapter_names(adapters)
    methods = [Method(BASE), *(Method(label, name) for label, name in names.items())]
    state = AcceleratorState()
    recipe = Recipe(
        base=config.pretrained_model_name_or_path,
        grid=Grid(prompts, validation_seeds(config), methods),
        drawing=validation_drawing(config),
        adapters={names[label]: path for label, path in adapters.items()},
        dtype=state.mixed_precision if state.mixed_precision in DTYPES else "fp32",
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
        title="The same prompt, seed and initial noise in every row",
        footer=footer(config, len(samples)),
        strip=[_picture_file(sample.path, output / "comparison") for sample in samples[:MOST_IN_STRIP]],
    )
    folder, sheet = output / "comparison", output / COMPARISON
    draw_grid(recipe, folder, device=state.device, sheet=sheet, overwrite=True, flag="--output_dir")
    logger.info("the comparison is in %s", sheet)
    return comparison_exhibit(sheet, folder)


def _picture_file(image: Path | EmbeddedImage, folder: Path) -> Path:
    """The file of a training image; one that isn't a file is written into the folder."""
    if isinstance(image, Path):
        return image
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{image.name}.png"
    save_picture(composite(open_image(image), (255, 255, 255)), file)
    return file
