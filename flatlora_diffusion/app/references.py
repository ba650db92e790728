"""What the adapters were taught: the training images of their runs, and the held-out ones beside them."""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.data.folders import read_folder
from flatlora_diffusion.data.images import WHITE, complete_caption, composite
from flatlora_diffusion.output.reading import RunFolder

logger = logging.getLogger(__name__)

_MOST_THUMBNAILS = 24
_THUMBNAIL = 96  # pixels a side: shown at half of that, sharp on dense screens too
_MOST_PRESETS = 4


@dataclass(frozen=True)
class Example:
    """A picture that says how a prompt should look.

    Attributes:
        caption: The prompt.
        file: The picture.
    """

    caption: str
    file: Path


@dataclass(frozen=True)
class References:
    """Pictures of the taught kind.

    Attributes:
        trained: Those that the adapters were trained with.
        heldout: Those that they never saw.
        prompts: That the runs were validated with.
        subject: Words that stand for what is taught in prompts.
    """

    trained: Sequence[Example] = ()
    heldout: Sequence[Example] = ()
    prompts: Sequence[str] = ()
    subject: str | None = None

    @classmethod
    def of_runs(cls, runs: Mapping[str, RunFolder]) -> References:
        """The images of the first run that has any, mostly those of all; the prompts of all runs."""
        prompts: list[str] = []
        found = cls()
        for run in runs.values():
            reading = run.read()
            prompts += reading.settings.get("validation_prompt") or ()
            if found.trained or found.heldout:
                continue
            subject = str(reading.settings.get("instance_prompt") or "")
            trained, heldout = (
                _examples(reading.image_folders.get(name), subject)
                for name in ("instance_data_dir", "heldout_data_dir")
            )
            found = cls(trained, heldout, (), subject or None)
        return cls(found.trained, found.heldout, tuple(dict.fromkeys(prompts)), found.subject)

    def truth(self, prompt: str) -> tuple[str, Example] | None:
        """The picture that a prompt names, and what it is called; None where none has that caption alone."""
        for told, examples in (
            ("The true picture, never trained", self.heldout),
            ("The true picture, trained", self.trained),
        ):
            named = [example for example in examples if example.caption.strip() == prompt.strip()]
            if len(named) == 1:
                return told, named[0]
        return None

    def presets(self) -> dict[str, Sequence[str]]:
        """Heading -> prompts to choose from: never trained, trained, and other styles."""
        trained, heldout = (_distinct(examples) for examples in (self.trained, self.heldout))
        groups = {
            "Subjects it was never shown": _first([p for p in self.prompts if p in heldout], heldout),
            "Subjects among the icons": _first([p for p in self.prompts if p in trained], trained),
        }
        known = {*trained, *heldout}
        others = [prompt for prompt in self.prompts if prompt not in known]
        foreign = [prompt for prompt in others if self.subject and self.subject not in prompt]
        groups["Prompts of validation"] = [prompt for prompt in others if prompt not in foreign]
        groups["Styles known before: are they still drawn?"] = foreign
        return {heading: prompts for heading, prompts in groups.items() if prompts}

    def strip(self) -> str:
        """The training images as a line of small pictures, in HTML; empty where there are none."""
        shown = [
            (example.caption, thumbnail)
            for example in self.trained[:_MOST_THUMBNAILS]
            if (thumbnail := _thumbnail(example.file))
        ]
        if not shown:
            return ""
        count = len(self.trained)
        of_all = "" if len(shown) == count else f" (the first {len(shown)})"
        pictures = "".join(
            f'<img src="{source}" alt="{html.escape(caption)}" title="{html.escape(caption)}">'
            for caption, source in shown
        )
        told = f"<p>The style was learnt from these {count} icons{of_all}:</p>"
        return f'{told}<div class="strip">{pictures}</div>'


def true_picture(example: Example) -> Image.Image | None:
    """An example on white, without whatever its file carries; None where it can't be opened."""
    try:
        return composite(open_image(example.file), WHITE)
    except UserError as error:
        logger.warning("%s", error)
        return None


def _examples(folder: Path | None, subject: str) -> list[Example]:
    if folder is None:
        return []
    try:
        pictures = read_folder(folder).pictures
    except (UserError, OSError) as error:
        logger.warning("the images of a run are not shown: %s", error)
        return []
    return [Example(complete_caption(picture.caption, subject), picture.path) for picture in pictures]


def _distinct(examples: Iterable[Example]) -> list[str]:
    """Captions that one picture alone has."""
    counts = Counter(example.caption for example in examples)
    return [caption for caption, count in counts.items() if count == 1 and caption.strip()]


def _first(wanted: Sequence[str], more: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*wanted, *more]))[:_MOST_PRESETS]


@functools.lru_cache(_MOST_THUMBNAILS)  # two tabs show them
def _thumbnail(file: Path) -> str | None:
    """A small copy as a data URL: pixels alone, and no path."""
    picture = true_picture(Example("", file))
    if picture is None:
        return None
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
