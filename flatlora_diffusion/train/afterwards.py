"""What follows training: the comparison picture, model cards, the upload."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from flatlora_diffusion.common.command import invoked_as, shell_line
from flatlora_diffusion.common.devices import DTYPES, is_out_of_memory, release
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.common.pictures import open_image, save_picture
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import WHITE, EmbeddedImage, Sample, composite
from flatlora_diffusion.draw.adapters import adapter_names
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.grid.draw import draw_grid
from flatlora_diffusion.grid.plan import Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.output.card import Exhibit, Making, comparison_exhibit, seen_from_arm, write_card
from flatlora_diffusion.output.gallery import SideBySide, final_drawing, footer, validation_seeds
from flatlora_diffusion.output.hub import upload
from flatlora_diffusion.output.names import COMPARISON
from flatlora_diffusion.sheet.files import MANIFEST, read_manifest
from flatlora_diffusion.train.tracking import Tracked, report_pictures

logger = logging.getLogger(__name__)


MOST_IN_STRIP = 64  # training images above the comparison


def present(
    config: TrainConfig,
    arms: list[TrainConfig],
    samples: list[Sample],
    heldout_samples: list[Sample],
    side_by_side: SideBySide | None,
    repository: str | None,
    tracked: Tracked | None = None,
) -> None:
    """Draw, describe and upload what was trained: each of these, whatever became of those before.

    Args:
        config: Settings of the run, or of the comparison.
        arms: Those of its runs.
        samples: The training images.
        heldout_samples: Images of the taught style that weren't trained.
        side_by_side: Shows the validation pictures of a comparison.
        repository: Its name on the hub, where it is uploaded.
        tracked: The trackers of the last run, for the pictures.

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
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failures.append("out of memory while the comparison was drawn")
        except (UserError, OSError) as error:
            failures.append(str(error))
        except KeyboardInterrupt as stop:
            raise RunInterruptedError(f"interrupted; {saved}", signal.SIGINT) from stop
        return None

    if side_by_side:
        attempt(side_by_side.draw_missing)
    exhibit = None
    if prompts := prompts_after(config, samples):
        exhibit = attempt(_draw_comparison, config, samples, heldout_samples, prompts, adapters)
        release()
        if exhibit:
            attempt(report_final, tracked, Path(config.output_dir, "comparison"), list(adapters))
    state = AcceleratorState()
    making = Making(len(samples), state.num_processes, state.mixed_precision)
    if config.compare:
        shown = seen_from_arm(exhibit) if exhibit else None
        for arm in arms:
            attempt(write_card, arm, {arm.method: Path(arm.output_dir)}, making, shown)
    attempt(write_card, config, adapters, making, exhibit, repository)
    if repository:
        attempt(upload, config, repository)
    if failures:
        raise UserError(f"{'; '.join(failures)} ({saved})")
    app = ["flatlora-app"] if invoked_as("") else ["python", "app.py"]
    logger.info("to look at it in a browser:\n  %s", shell_line([*app, "--run", config.output_dir]))


def prompts_after(config: TrainConfig, samples: list[Sample]) -> list[str]:
    """The prompts that are drawn after training: those of validation; of a comparison else the captions."""
    if not config.num_validation_images or not (config.compare or config.validation_prompt):
        return []
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    return list(dict.fromkeys(config.validation_prompt or captions[:4]))


def report_final(tracked: Tracked | None, folder: Path, methods: list[str]) -> None:
    """Send the pictures after training to the trackers: as `test`, of several methods as `test METHOD`.

    Args:
        tracked: The trackers that are open.
        folder: Where the pictures and their manifest are.
        methods: Those whose pictures are sent: columns of the manifest.
    """
    if tracked is None:
        return
    manifest = read_manifest(folder / MANIFEST)
    for method in methods:
        column = manifest["columns"].index(method)
        files = [folder / row["images"][column] for row in manifest["rows"]]
        captions = [f"{row['prompt']} (seed {row['seed']})" for row in manifest["rows"]]
        phase = f"test {method}" if len(methods) > 1 else "test"
        report_pictures(
            tracked.trackers, phase, [open_image(file) for file in files], captions, tracked.epoch
        )


def _draw_comparison(
    config: TrainConfig,
    samples: list[Sample],
    heldout_samples: list[Sample],
    prompts: list[str],
    adapters: dict[str, Path],
) -> Exhibit:
    """The base beside the adapters, loaded from disk as any user would load them."""
    output = Path(config.output_dir)
    folder = output / "comparison"
    names = adapter_names(adapters)
    methods = [Method(BASE), *(Method(label, name) for label, name in names.items())]
    state, drawing = AcceleratorState(), final_drawing(config)
    recipe = Recipe(
        base=config.pretrained_model_name_or_path,
        grid=Grid(prompts, validation_seeds(config), methods),
        drawing=drawing,
        adapters={names[label]: path for label, path in adapters.items()},
        dtype=state.mixed_precision if state.mixed_precision in DTYPES else "fp32",
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
        title="In each row: the same prompt, seed and initial noise",
        footer=footer(config, len(samples), drawing),
        strip=[_picture_file(sample.path, folder) for sample in samples[:MOST_IN_STRIP]],
        references={
            prompt: _picture_file(found[0].path, folder)
            for prompt in prompts
            if len(found := [own for own in (*samples, *heldout_samples) if own.caption == prompt]) == 1
        },
    )
    sheet = output / COMPARISON
    draw_grid(
        recipe,
        folder,
        device=state.device,
        sheet=sheet,
        overwrite=True,
        flag="--output_dir",
        base_flag="--pretrained_model_name_or_path",
    )
    logger.info("the comparison is in %s", sheet)
    return comparison_exhibit(sheet, folder)


def _picture_file(image: Path | EmbeddedImage, folder: Path) -> Path:
    """The file of a training image; one that isn't a file is written into the folder."""
    if isinstance(image, Path):
        return image
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{image.name}.png"
    save_picture(composite(open_image(image), WHITE), file)
    return file
