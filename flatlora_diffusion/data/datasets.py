"""Images and captions of a Hugging Face dataset: of the hub, or a local folder that `datasets` reads."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.extras import import_extra
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.data.images import EmbeddedImage, Sample, complete_caption

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

_FIRST_WITHOUT_SCRIPTS = 4  # older versions can run Python code that a dataset brings along


@dataclass(frozen=True)
class DatasetSource:
    """A dataset and where in it images and captions are.

    Attributes:
        name: Of the hub, or a local folder that `datasets` reads.
        configuration: Which one, where it has several.
        cache: Folder for what the library downloads and converts; None for its own.
        image_column: Column of the images.
        caption_column: Column of the captions, where there is one.
    """

    name: str
    configuration: str | None = None
    cache: str | None = None
    image_column: str = "image"
    caption_column: str | None = None


def dataset_samples(source: DatasetSource, split: str, instance_prompt: str) -> list[Sample]:
    """The images of a split of a dataset with their captions, by row.

    As in the diffusers script, captions come from `caption_column`, and without it they are all the instance
    prompt, which also stands in where a caption is empty.

    Args:
        source: The dataset.
        split: Name of the split.
        instance_prompt: The caption of images without one.

    Raises:
        UserError: The package is missing or old; there is no such dataset, split or column; a column holds
            something else; an image is missing or damaged.
    """
    library = import_extra("datasets", "--dataset_name")
    flag = f"--dataset_name {source.name}"
    rows = _load(library, source, split)
    _check_columns(library, source, rows)
    if not len(rows):  # some versions of the library refuse it themselves
        raise UserError(f"{flag}: no image in its split {split}")
    if source.caption_column is None:
        logger.info("%s: no --caption_column, so the instance prompt is every caption", flag)
        captions = [None] * len(rows)
    else:
        captions = rows[source.caption_column]
    images = rows.select_columns([source.image_column])
    images = images.cast_column(source.image_column, library.Image(decode=False))
    samples = []
    for number, caption in enumerate(captions):
        where = f"{flag}: row {number} of {split}, counted from 0"
        read = functools.partial(_image_bytes, images, number, source.image_column, where)
        image = EmbeddedImage(f"row-{number:05d}", where, read)
        open_image(image)  # a damaged one is reported before anything is loaded or written
        if not isinstance(caption, (str, type(None))):
            kind = type(caption).__name__
            raise UserError(f"{where}: --caption_column {source.caption_column} holds a {kind}, not text")
        samples.append(Sample(image, complete_caption((caption or "").strip(), instance_prompt)))
    count, own = len(samples), sum(bool((caption or "").strip()) for caption in captions)
    source_of = f" ({own} from its column {source.caption_column})" if own else ""
    logger.info(
        "%s, %s: %d image%s, %d with captions%s, %d without",
        *(flag, split, count, "s" * (count != 1), own, source_of, count - own),
    )
    return samples


def dataset_captions(name: str, column: str, split: str = "train") -> list[str]:
    """The captions of a dataset as they are, by row; its images aren't looked at.

    Args:
        name: Of the hub, or a local folder that `datasets` reads.
        column: Which of its columns holds them.
        split: Name of the split.

    Raises:
        UserError: The package is missing or old; there is no such dataset, split or column; the column holds
            something else than text.
    """
    rows = _load(import_extra("datasets", "--dataset_name"), DatasetSource(name), split)
    _check_column("caption_column", column, name, rows)
    captions = rows[column]
    for number, caption in enumerate(captions):
        if not isinstance(caption, (str, type(None))):
            where = f"--dataset_name {name}: row {number} of {split}, counted from 0"
            raise UserError(f"{where}: --caption_column {column} holds a {type(caption).__name__}, not text")
    return [(caption or "").strip() for caption in captions]


def _load(library: ModuleType, source: DatasetSource, split: str) -> Dataset:
    flag = f"--dataset_name {source.name}"
    if int(library.__version__.split(".")[0]) < _FIRST_WITHOUT_SCRIPTS:
        raise UserError(
            f"--dataset_name: the package datasets {library.__version__} can run code of a dataset; "
            f"{_FIRST_WITHOUT_SCRIPTS}.0 or newer is needed: pip install --upgrade datasets"
        )
    verbosity = library.logging.get_verbosity()
    try:
        library.logging.set_verbosity(logging.CRITICAL)  # the error that it raises says all that it logs
        if Path(source.name).is_dir():
            library.disable_progress_bars()  # there is nothing to wait for
        splits = library.load_dataset(source.name, source.configuration, cache_dir=source.cache)
    except (
        Exception
    ) as error:  # of files, the network, YAML, Arrow, ...: all say what is wrong with the input
        unspecific = type(error) is library.exceptions.DatasetGenerationError
        reason = " ".join(str((unspecific and error.__cause__) or error).split())
        raise UserError(
            f"{flag}: cannot be loaded ({reason[:300]}); give a dataset of the hub, or a local folder"
        ) from error
    finally:
        library.logging.set_verbosity(verbosity)
    if split not in splits:
        raise UserError(f"{flag}: no split {split} in it (there: {', '.join(splits)})")
    return splits[split]


def _check_columns(library: ModuleType, source: DatasetSource, rows: Dataset) -> None:
    for name in ("image_column", "caption_column"):
        column = getattr(source, name)
        if column is not None:
            _check_column(name, column, source.name, rows)
    kind = rows.features[source.image_column]
    if not isinstance(kind, library.Image):
        images = [name for name, other in rows.features.items() if isinstance(other, library.Image)]
        raise UserError(
            f"--image_column {source.image_column}: holds {kind}, not images "
            f"(columns of images: {', '.join(images) or 'none'})"
        )


def _check_column(flag: str, column: str, dataset: str, rows: Dataset) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"--{flag} {column}: no such column in {dataset} (there: {', '.join(rows.column_names)})"
        )


def _image_bytes(images: Dataset, number: int, column: str, where: str) -> bytes:
    """The content of the image's file, which is in the row or named by it."""
    cell = images[number][column]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError(f"{where}: there is no image")
    return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
