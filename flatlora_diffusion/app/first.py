"""The comparison that the page opens with: drawn once for its adapters and base, and kept beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flatlora_diffusion.app.comparison import Asked, Comparison
from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.files import forget, zipped
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.samplers import SAMPLERS

if TYPE_CHECKING:
    from flatlora_diffusion.app.site import Site

logger = logging.getLogger(__name__)

FOLDER = "page-comparison"
_NOTE = "comparison.json"


class FirstComparison:
    """Has the comparison as soon as it is there.

    Args:
        site: Draws, and knows the first prompt.

    Attributes:
        ready: The comparison; None until it is drawn, or where nothing is to be drawn.
        coming: Whether it is to be drawn, or being drawn.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.ready: Comparison | None = None
        self.coming = False
        self._asked: Asked | None = None

    def find(self) -> None:
        """Read what is kept; where nothing is, it is coming: `begin` draws it.

        It isn't drawn unasked where that takes minutes: with a large base on a CPU.
        """
        site = self._site
        prompts = [prompt for group in site.presets.values() for prompt in group]
        if not prompts or not site.studio.adapters:
            return
        self._asked = Asked(prompts[0], 0, self._drawing(), 1.0, site.studio.mixes)
        self.ready = self._read(self._asked)
        self.coming = self.ready is None and site.draws_fast

    def begin(self) -> None:
        """Draw in a thread what `find` hasn't found: when the page answers, which comes first."""
        if self.coming and self._asked:
            threading.Thread(
                target=self._draw, args=(self._asked,), name="first comparison", daemon=True
            ).start()

    def _drawing(self) -> Drawing:
        site, side = self._site, self._site.studio.native_side
        return site.drawing("", site.steps, site.guidance, SAMPLERS[0], side, side)

    @property
    def _place(self) -> Path:
        """Beside the last adapter: the one on the right side."""
        return list(self._site.studio.adapters.values())[-1].file.parent / FOLDER

    def _key(self, asked: Asked) -> str:
        studio = self._site.studio
        parts = [dataclasses.asdict(asked), studio.fingerprint, studio.dtype]
        parts += [(label, adapter.sha256) for label, adapter in studio.adapters.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _read(self, asked: Asked) -> Comparison | None:
        try:
            note = json.loads((self._place / _NOTE).read_text(encoding="utf-8"))
            if note["key"] != self._key(asked):
                return None
            files = {method: self._place / Path(name).name for method, name in note["files"].items()}
            seconds = {method: float(took) for method, took in note["seconds"].items()}
            if list(files) != list(seconds) or list(files) != list(self._site.studio.methods):
                return None
            # Whoever looks at the page gets copies: what is beside the adapter stays as it is.
            folder = self._site.new_folder()
            for png in files.values():
                for file in (png, png.with_suffix(".json")):
                    (folder / file.name).write_bytes(file.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # missing, half written or of another version: it is drawn again
        shown = {method: folder / file.name for method, file in files.items()}
        return Comparison(asked, shown, seconds, zipped(folder, "comparison.zip"), lent=False)

    def _draw(self, asked: Asked) -> None:
        folder = self._site.new_folder()
        try:
            self.ready = drawn_comparison(self._site, asked, folder)
            self._keep(self.ready, self._key(asked))
        except Exception as error:  # the page works without
            forget([folder])
            logger.warning("the page's first comparison was not drawn: %s", error)
        finally:
            self.coming = False

    def _keep(self, comparison: Comparison, key: str) -> None:
        place = self._place
        try:
            place.mkdir(exist_ok=True)
            for file in comparison.files.values():
                for written in (file, file.with_suffix(".json")):
                    write_atomically(place / file.with_suffix(written.suffix).name, written.read_bytes())
            note = {
                "key": key,
                "files": {method: file.name for method, file in comparison.files.items()},
                "seconds": dict(comparison.seconds),
            }
            write_atomically(place / _NOTE, json.dumps(note, indent=2).encode())
        except (OSError, UserError) as error:  # such as a folder that can't be written
            logger.info("the page's first comparison is drawn at each start: %s", error)


def drawn_comparison(site: Site, asked: Asked, folder: Path) -> Comparison:
    """Draw a comparison without telling how it goes."""
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    methods = site.studio.methods
    for event in site.studio.run(comparison_jobs(methods, asked)):
        if isinstance(event, Drawn):
            method = methods[event.job]
            files[method], _ = site.picture_files(folder, event.pictures[0], *asked.made(method))
            seconds[method] = event.seconds
    return Comparison(asked, files, seconds, zipped(folder, "comparison.zip"), lent=False)


def comparison_jobs(methods: Sequence[str], asked: Asked) -> list[Job]:
    """A picture for each method."""
    pictures, mixes = [(asked.prompt, asked.seed)], dict(asked.mixes)
    return [
        Job(method, pictures, asked.drawing, asked.scale, parts=mixes.get(method, ())) for method in methods
    ]
