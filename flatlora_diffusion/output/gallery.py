"""Validation pictures on disk: single ones, contact sheets, and the arms of a comparison side by side.

A run's `validation/` has for each validation the single pictures and their manifest in `step-NNNNNN/`, and
their sheet in `step-NNNNNN.png`. With `--compare`, `validation/` beside the two runs has for each validation
a sheet with a column for each run, and one for the base, whose pictures are in `base/`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.pictures import save_picture
from flatlora_diffusion.config.settings import FLAT, TrainConfig
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.output.names import numbered_steps, step_name
from flatlora_diffusion.sheet.files import MANIFEST, Sheet, SheetRow, draw_sheet, read_manifest

logger = logging.getLogger(__name__)


def validation_drawing(config: TrainConfig) -> Drawing:
    """How validation pictures are drawn; their size must be set."""
    side = config.validation_resolution
    assert side is not None, "training sets it to the base's own"
    return Drawing(
        *(side, side, config.validation_inference_steps, config.validation_guidance_scale),
        sampler=config.validation_sampler,
        caption_chunks=config.caption_chunks,
    )


def final_drawing(config: TrainConfig) -> Drawing:
    """How the pictures after training are drawn; their size must be set."""
    return dataclasses.replace(validation_drawing(config), steps=config.final_steps)


def validation_seeds(config: TrainConfig) -> range:
    """The seeds of each validation prompt."""
    return range(config.seed, config.seed + config.num_validation_images)


def footer(config: TrainConfig, images: int, drawing: Drawing) -> str:
    """The small print of a sheet: what was trained, where there are training images, and how it was drawn."""
    trained = ""
    if images:
        trained = f", {images} training images, rank {config.rank}, learning rate {config.learning_rate:g}"
        if config.method == FLAT:
            trained += f", {FLAT} sigma {config.flat_sigma:g} ({config.flat_schedule})"
    base = Path(config.pretrained_model_name_or_path).name
    return f"{base}{trained}; {drawing.steps} denoising steps, guidance {drawing.guidance:g}"


class Gallery:
    """A folder of validation pictures.

    Args:
        folder: Made when the first pictures are written.
        config: What is drawn, and how.
        precision: In which it is drawn.
        images: Number of training images, for the small print; 0 for pictures of the base.
    """

    def __init__(self, folder: Path, config: TrainConfig, precision: str, images: int) -> None:
        self.folder = folder
        self._footer = footer(config, images, validation_drawing(config))
        seeds = validation_seeds(config)
        self._layout = {
            "columns": [f"seed {seed}" for seed in seeds],
            "rows": [
                {"label": prompt, "images": [f"{number:03d}-seed{seed}.png" for seed in seeds]}
                for number, prompt in enumerate(config.prompts_to_draw)
            ],
            "drawing": {
                "base": config.pretrained_model_name_or_path,
                "revision": config.revision,
                "variant": config.variant,
                "vae": config.pretrained_vae_model_name_or_path,
                "precision": precision,
                **dataclasses.asdict(validation_drawing(config)),
            },
        }

    def has(self, name: str) -> bool:
        """Whether all pictures of that name that these settings ask for are there."""
        manifest = _read(self.folder / name)
        return {key: manifest.get(key) for key in self._layout} == self._layout

    def write(self, pictures: Sequence[Image.Image], name: str, title: str) -> None:
        """Write the pictures, the manifest and the sheet.

        Args:
            pictures: Those of the first prompt, one for each seed, then those of the next.
            name: Of the folder and of the sheet.
            title: Of the sheet.

        Raises:
            UserError: The disk is full or not writable.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for old in folder.glob("[0-9]*-seed*.png"):  # of other prompts or seeds
            old.unlink()
        files = [file for row in self._layout["rows"] for file in row["images"]]
        for file, picture in zip(files, pictures, strict=True):
            save_picture(picture, folder / file)
        manifest = {**self._layout, "title": title, "footer": self._footer}
        # The manifest comes last: where it is, the pictures are.
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        try:
            sheet = draw_sheet(folder)
        except UserError as error:  # too many pictures; training goes on
            logger.warning("%s", error)
            return
        save_picture(sheet, folder.with_name(f"{name}.png"))


@dataclass(frozen=True)
class SideBySide:
    """The galleries of a comparison and what shows them together.

    Attributes:
        folder: Of the sheets, and of the pictures of the base.
        arms: Heading of the column -> the gallery's folder.
    """

    folder: Path
    arms: dict[str, Path]

    @property
    def last(self) -> Path:
        """The gallery that is drawn last: with its pictures of a step, those of all arms are there."""
        return next(reversed(self.arms.values()))

    def draw(self, step: int) -> None:
        """Write the sheet of a step, where all arms have drawn the same there; else there is none.

        Raises:
            UserError: The disk is full or not writable.
        """
        folders = {label: folder / step_name(step) for label, folder in self.arms.items()}
        layouts = [_comparable(folder) for folder in folders.values()]
        if not layouts[0] or any(layout != layouts[0] for layout in layouts):
            return
        if _comparable(self.folder / BASE) == layouts[0]:
            folders = {BASE: self.folder / BASE, **folders}
        sheets = {label: Sheet.load(folder) for label, folder in folders.items()}
        last = next(reversed(sheets.values()))
        together = Sheet(
            columns=list(sheets),
            rows=[
                SheetRow(
                    f"{row.label}\n{seed}",
                    [sheet.rows[number].images[place] for sheet in sheets.values()],
                )
                for number, row in enumerate(last.rows)
                for place, seed in enumerate(last.columns)
            ],
            title=f"After step {step}; in each row: the same prompt, seed and initial noise",
            footer=last.footer,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            picture = together.draw()
        except (ValueError, UserError) as error:  # too many pictures, or one has gone
            logger.warning("no sheet of step %d side by side: %s", step, error)
            return
        save_picture(picture, self.folder / f"{step_name(step)}.png")

    def draw_missing(self) -> None:
        """Write the sheets that an interruption kept from being written."""
        for step in numbered_steps(manifest.parent for manifest in self.last.glob(f"step-*/{MANIFEST}")):
            if not (self.folder / f"{step_name(step)}.png").is_file():
                self.draw(step)


def _comparable(folder: Path) -> dict[str, Any]:
    """What pictures must have in common to be shown in a row; empty where there are none."""
    manifest = _read(folder)
    return {key: manifest[key] for key in ("columns", "rows", "drawing") if key in manifest}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_manifest(folder / MANIFEST)
    except ValueError:  # not drawn, or not by a run
        return {}
