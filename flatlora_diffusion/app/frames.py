"""Pictures that were drawn lately, by all that makes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from flatlora_diffusion.draw.stamp import BASE

if TYPE_CHECKING:
    from flatlora_diffusion.app.engine import Job

_MOST_BYTES = 2**26  # of pictures that are remembered: 20 of 1024 x 1024 pixels


class Frames:
    """Pictures that were drawn lately, so that they needn't be drawn again. The pipeline's lock guards it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Image.Image] = OrderedDict()
        self._bytes = 0

    def of(self, job: Job) -> list[Image.Image]:
        """Copies of a job's pictures; none where one is missing."""
        keys = self._keys(job)
        if not all(key in self._known for key in keys):
            return []
        for key in keys:
            self._known.move_to_end(key)
        return [self._known[key].copy() for key in keys]

    def keep(self, job: Job, pictures: Sequence[Image.Image]) -> None:
        """Remember a job's pictures, and forget the oldest ones."""
        for key, picture in zip(self._keys(job), pictures, strict=True):
            if key not in self._known:
                self._known[key] = picture.copy()
                self._bytes += _size(picture)
        while self._bytes > _MOST_BYTES:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)

    @staticmethod
    def _keys(job: Job) -> list[Hashable]:
        scale = None if job.method == BASE else job.scale
        how = (job.method, job.drawing, scale, job.shake, job.parts, job.added)
        return [(*how, prompt, seed) for prompt, seed in job.pictures]


def _size(picture: Image.Image) -> int:
    return len(picture.getbands()) * picture.width * picture.height
