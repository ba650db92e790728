"""Pictures of methods for fixed prompts and seeds, kept in a folder, and what they tell of an adapter."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.common.devices import DTYPES
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.common.processes import ALONE, Processes, require_shared
from flatlora_diffusion.data.images import Sample
from flatlora_diffusion.draw.pipeline import Drawing, draw_batch
from flatlora_diffusion.draw.samplers import sampler_name
from flatlora_diffusion.draw.stamp import BASE, Stamp, base_name, png, read, versions
from flatlora_diffusion.evaluate.likeness import (
    Likeness,
    drift,
    nearest_similarity,
    paired_similarity,
    pixel_drift,
)
from flatlora_diffusion.grid.plan import unique_slugs

_COMPARED = 64  # values of every weight


class Drawer:
    """Draws pictures, each once: it is kept as a PNG whose stamp tells how it was drawn.

    Args:
        pipeline: With the adapters loaded.
        base: Folder or hub name that it was loaded from.
        adapters: Name under which each is loaded -> what `load_adapter` told of it.
        drawing: How pictures are drawn.
        folder: Where they are kept, those of each adapter and scale in a folder of their own.
        batch_size: Pictures denoised together. On the CPU it doesn't change a bit of them.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        base: str,
        adapters: Mapping[str, AdapterFacts],
        drawing: Drawing,
        folder: Path,
        *,
        batch_size: int = 1,
    ) -> None:
        self._pipeline = pipeline
        self._drawing = drawing
        self._batch_size = batch_size
        self._hashes = {name: facts.sha256 for name, facts in adapters.items()}
        slugs = unique_slugs([BASE, *adapters])
        self._folders = {name: folder / slug for name, slug in zip([None, *adapters], slugs, strict=True)}
        names = {dtype: name for name, dtype in DTYPES.items()}
        self._shared = {
            "negative_prompt": drawing.negative_prompt,
            "width": drawing.width,
            "height": drawing.height,
            "steps": drawing.steps,
            "guidance": drawing.guidance,
            "caption_chunks": drawing.caption_chunks,
            "sampler": sampler_name(drawing.sampler, pipeline.scheduler),
            "base": f"{base_name(base)}@{fingerprint(pipeline)}",
            "dtype": names[pipeline.unet.dtype],
            "device": pipeline.device.type,
            "versions": versions(),
        }

    def draw(
        self,
        pictures: Sequence[tuple[str, int]],
        adapter: str | None = None,
        scale: float = 1.0,
        *,
        processes: Processes = ALONE,
    ) -> list[Image.Image]:
        """Pictures with an adapter, or with the base alone; those that are in the folder aren't drawn again.

        A picture that was drawn in another way, with another adapter file say, is replaced. Which ones are
        denoised together doesn't depend on those that are there.

        Args:
            pictures: The prompt and the seed of each.
            adapter: Name under which it is loaded, or None.
            scale: Of the adapter's update.
            processes: Share out the batches; each calls this `together`.

        Raises:
            UserError: The folder cannot be written to, or the disk is full, or not that of all processes.
        """
        folder = self._folders[adapter]
        if adapter is not None:
            folder = folder / f"scale-{float(scale)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
        files = [folder / _file_name(prompt, seed) for prompt, seed in pictures]
        stamps = [self._stamp(prompt, seed, adapter, scale) for prompt, seed in pictures]
        own = [_stored(file, stamp) for file, stamp in zip(files, stamps, strict=True)]
        there = processes.from_main(lambda: [picture is not None for picture in own])
        batches = [
            range(len(pictures))[at : at + self._batch_size]
            for at in range(0, len(pictures), self._batch_size)
        ]
        left = [batch for batch in batches if not all(there[index] for index in batch)]
        missing = there.count(False)
        with tqdm(
            total=missing,
            desc=f"drawing {adapter or BASE}",
            unit="picture",
            disable=not (missing and processes.is_main),
        ) as bar:
            for batch in processes.turns(left):
                new = [index for index in batch or () if not there[index]]
                if batch is not None:
                    wanted = [pictures[index] for index in batch]
                    drawn = draw_batch(self._pipeline, adapter, wanted, self._drawing, scale=scale)
                    for index, picture in zip(batch, drawn, strict=True):
                        if index in new:
                            write_atomically(files[index], png(picture, stamps[index]))
                            own[index] = picture
                bar.update(sum(processes.gather(len(new))))
        found = [
            _stored(file, stamp) if picture is None else picture
            for file, stamp, picture in zip(files, stamps, own, strict=True)
        ]
        require_shared("pictures", str(folder), found.count(None))
        return [picture for picture in found if picture is not None]  # now all of them

    def _stamp(self, prompt: str, seed: int, adapter: str | None, scale: float) -> Stamp:
        return Stamp(
            prompt=prompt,
            seed=seed,
            method=adapter or BASE,
            adapter_sha256=adapter and self._hashes[adapter],
            scale=None if adapter is None else scale,
            **self._shared,
        )


def _file_name(prompt: str, seed: int) -> str:
    """One that no other prompt has, though long ones may begin alike."""
    return f"{unique_slugs([prompt])[0]}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}-seed{seed}.png"


def _stored(file: Path, expected: Stamp) -> Image.Image | None:
    """The picture of a file, if it is there, whole, and was drawn like this."""
    with contextlib.suppress(UserError):
        if file.is_file() and read(file) == expected:
            return open_image(file)
    return None


def fingerprint(pipeline: StableDiffusionXLPipeline) -> str:
    """A short hash of a base that tells it from others of its name: of a few values of every weight.

    Adapters that are loaded don't change it.
    """
    noise_levels = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    sha = hashlib.sha256(json.dumps(noise_levels, sort_keys=True, default=str).encode())
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for name, weight in part.named_parameters():
            if "lora_" not in name:
                sha.update(weight.detach().flatten()[:_COMPARED].float().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


class Personalisation:
    """How near drawn pictures come to the true held-out ones, and to copies of the training pictures.

    Each held-out caption is drawn once, with its place as the seed, by every method alike.

    Args:
        drawer: Draws.
        likeness: Compares.
        heldout: Pictures of the taught style that were never trained, with their captions.
        training: Those that were; empty where they aren't at hand: copying isn't measured then.

    Attributes:
        wanted: The prompt and the seed of each picture.

    Raises:
        UserError: An image cannot be read.
    """

    def __init__(
        self, drawer: Drawer, likeness: Likeness, heldout: Sequence[Sample], training: Sequence[Sample]
    ) -> None:
        self._drawer, self._likeness = drawer, likeness
        self.wanted = [(sample.caption, seed) for seed, sample in enumerate(heldout)]
        self._true = _features(likeness, heldout)
        self._training = _features(likeness, training) if training else None

    def measure(self, adapter: str | None = None, scale: float = 1.0) -> dict[str, Any]:
        """`clip_i`, and with training pictures `nearest_training` of the `drawn` and the `true` pictures.

        Args:
            adapter: Name under which it is loaded, or None for the base alone.
            scale: Of the adapter's update.

        Raises:
            UserError: The pictures cannot be written.
        """
        drawn = self._likeness.pictures(self._drawer.draw(self.wanted, adapter, scale))
        result: dict[str, Any] = {"clip_i": paired_similarity(drawn, self._true)}
        if self._training is not None:
            result["nearest_training"] = {
                "drawn": nearest_similarity(drawn, self._training),
                "true": nearest_similarity(self._true, self._training),
            }
        return result


def _features(likeness: Likeness, samples: Sequence[Sample]) -> Tensor:
    return likeness.pictures([open_image(sample.path) for sample in samples])


class Retention:
    """Whether prompts that don't ask for what was taught are still drawn as by the base.

    Each prompt is drawn once, with its place as the seed, by every method alike.

    Args:
        drawer: Draws.
        likeness: Compares.
        prompts: Without the words that were trained.

    Attributes:
        wanted: The prompt and the seed of each picture.
    """

    def __init__(self, drawer: Drawer, likeness: Likeness, prompts: Sequence[str]) -> None:
        self._drawer, self._likeness = drawer, likeness
        self.wanted = [(prompt, seed) for seed, prompt in enumerate(prompts)]
        self._prompts = likeness.texts(prompts)

    @functools.cached_property
    def _base(self) -> tuple[list[Image.Image], Tensor]:
        """The base's own pictures and their features."""
        pictures = self._drawer.draw(self.wanted)
        return pictures, self._likeness.pictures(pictures)

    def measure(self, adapter: str | None = None, scale: float = 1.0) -> dict[str, float]:
        """`clip_t`, `drift` and `pixel_drift`; the latter two are 0 for the base itself.

        Args:
            adapter: Name under which it is loaded, or None for the base alone.
            scale: Of the adapter's update.

        Raises:
            UserError: The pictures cannot be written.
        """
        base_pictures, base = self._base
        pictures = self._drawer.draw(self.wanted, adapter, scale)
        drawn = self._likeness.pictures(pictures)
        return {
            "clip_t": paired_similarity(drawn, self._prompts),
            "drift": drift(drawn, base),
            "pixel_drift": pixel_drift(pictures, base_pictures),
        }
