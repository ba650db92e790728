"""The app's engine: one pipeline with its adapters, which requests use one after the other."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from flatlora_diffusion.adapter.facts import AdapterFacts, facts_of_mix
from flatlora_diffusion.adapter.mix import Source
from flatlora_diffusion.app.frames import Frames
from flatlora_diffusion.common.devices import DTYPES
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.active import activate, blended, parts_of
from flatlora_diffusion.draw.adapters import adapter_names, load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_batch, native_side, sketches, where_cut_in
from flatlora_diffusion.draw.samplers import sampler_name
from flatlora_diffusion.draw.shaken import Shake, shaken
from flatlora_diffusion.draw.stamp import BASE, Stamp, versions

SECONDS_BETWEEN_STEPS = 0.3  # that are told: whoever listens takes time from the drawing


@dataclass(frozen=True)
class Job:
    """Pictures to be drawn together, with one method.

    Attributes:
        method: `BASE` or the label of an adapter.
        pictures: The prompt and the seed of each.
        drawing: How.
        scale: Of the adapter's update.
        shake: What is done to the merged weights; None for nothing.
        parts: Of a mix: the scale of each of its adapters in place of its own.
        added: Label of another adapter whose update is added, and how many times.
    """

    method: str
    pictures: Sequence[tuple[str, int]]
    drawing: Drawing
    scale: float = 1.0
    shake: Shake | None = None
    parts: tuple[float, ...] = ()
    added: tuple[str, float] | None = None


@dataclass(frozen=True)
class Step:
    """A denoising step was done. Not each is told, only a few a second.

    Attributes:
        job: Index of the job that it belongs to.
        fraction: Of all steps of all jobs that are done.
        seconds_left: Until all jobs are done, from the steps so far.
        sketches: Small pictures of what the job's pictures have come to.
    """

    job: int
    fraction: float
    seconds_left: float
    sketches: list[Image.Image]


@dataclass(frozen=True)
class Drawn:
    """A job is done.

    Attributes:
        job: Its index.
        pictures: In the order asked for.
        seconds: That it took.
    """

    job: int
    pictures: list[Image.Image]
    seconds: float


class Studio:
    """A pipeline and its adapters, under labels that are fixed from the start.

    Args:
        pipeline: A base without adapters.
        base: What it is called in public: no local path.
        adapters: Label -> the adapter's file or folder, or several at once.
        caption_chunks: Pieces in which prompts are read.
        transparent: Flat grounds are taken away.

    Attributes:
        adapters: Label -> what the adapter's file is.
        caption_chunks: For drawings.
        transparent: For drawings.
        fingerprint: Of the base's weights.

    Raises:
        UserError: An adapter is missing, damaged, called like the base, or doesn't fit it.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        base: str,
        adapters: Mapping[str, Source],
        *,
        caption_chunks: int = 1,
        transparent: bool = False,
    ) -> None:
        if BASE in adapters:
            raise UserError(f"an adapter is called {BASE}, as the base is; give it another name")
        self.base = base
        names = adapter_names(adapters)
        self.adapters: dict[str, AdapterFacts] = {
            label: load_adapter(pipeline, names[label], path) for label, path in adapters.items()
        }
        self._pipeline = pipeline
        self.caption_chunks = caption_chunks
        self.transparent = transparent
        self.fingerprint = _fingerprint(pipeline)
        self._names: dict[str, str | None] = {BASE: None, **names}
        # Adapters and schedulers are states of the pipeline: it belongs to one run at a time.
        self._lock = threading.Lock()
        self._frames = Frames()
        self._running: dict[threading.Thread, threading.Event] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """The base and the adapters' labels."""
        return tuple(self._names)

    @property
    def native_side(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return native_side(self._pipeline)

    @property
    def device(self) -> str:
        """Kind of the device that draws."""
        return self._pipeline.device.type

    @property
    def dtype(self) -> str:
        """Precision in which pictures are drawn."""
        return next(name for name, dtype in DTYPES.items() if dtype == self._pipeline.dtype)

    @property
    def mixes(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """The labels of those that are several adapters at once, each with their scales."""
        return tuple(
            (label, tuple(scale for _, scale in adapter.mix))
            for label, adapter in self.adapters.items()
            if adapter.mix
        )

    def where_cut(self, prompt: str) -> str | None:
        """Where a prompt ends that is longer than the text encoders read with some method, else None."""
        found = (
            where_cut_in(self._pipeline, name, prompt, self.caption_chunks) for name in self._names.values()
        )
        return next(filter(None, found), None)

    def sampler(self, drawing: Drawing) -> str:
        """What the sampler of a drawing is called, also where it is the base's own."""
        return sampler_name(drawing.sampler, self._pipeline.scheduler)

    def run(self, jobs: Sequence[Job]) -> Iterator[Step | Drawn]:
        """Do jobs one after the other, without another's in between, and tell how it goes.

        Closing the iterator stops the drawing at the end of the step that is being computed; the next run
        waits for that. What goes wrong is raised here.
        """
        events: queue.SimpleQueue[Step | Drawn | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                while not self._lock.acquire(timeout=0.1):
                    if stop.is_set():
                        return
                try:
                    self._do(jobs, events.put, stop)
                finally:
                    self._lock.release()
                events.put(None)
            except _StoppedError:
                pass
            except BaseException as error:
                events.put(error)
            finally:
                self._running.pop(worker, None)

        worker = threading.Thread(target=work, name="drawing", daemon=True)
        self._running[worker] = stop
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()  # without waiting: a server's event loop may be what closes this

    def close(self, seconds: float = 5.0) -> bool:
        """Stop all that is being drawn, and wait for it: a thread inside torch doesn't survive Python's end.

        Args:
            seconds: To wait at most; a step of a large picture may take longer.

        Returns:
            Whether nothing is being drawn any more.
        """
        running = dict(self._running)
        for stop in running.values():
            stop.set()
        end = time.monotonic() + seconds
        for worker in running:
            worker.join(max(0.0, end - time.monotonic()))
        return not any(worker.is_alive() for worker in running)

    def stamp(
        self,
        method: str,
        prompt: str,
        seed: int,
        drawing: Drawing,
        scale: float = 1.0,
        parts: Sequence[float] = (),
    ) -> Stamp:
        """What a picture says of its making; for the arguments see `Job`."""
        adapter = self.adapters.get(method)
        if adapter and adapter.mix and parts:
            adapter = facts_of_mix([(own, part) for (own, _), part in zip(adapter.mix, parts, strict=True)])
        return Stamp(
            prompt=prompt,
            negative_prompt=drawing.negative_prompt,
            seed=seed,
            width=drawing.width,
            height=drawing.height,
            steps=drawing.steps,
            guidance=drawing.guidance,
            sampler=self.sampler(drawing),
            base=self.base,
            method=method,
            adapter_sha256=adapter.sha256 if adapter else None,
            scale=scale if adapter else None,
            dtype=self.dtype,
            device=self.device,
            versions=versions(),
            caption_chunks=drawing.caption_chunks,
            mix=adapter.mixed if adapter else None,
            transparent=drawing.transparent,
        )

    def _do(self, jobs: Sequence[Job], tell: Callable[[Step | Drawn], None], stop: threading.Event) -> None:
        known = {index: frames for index, job in enumerate(jobs) if (frames := self._frames.of(job))}
        total = sum(
            job.drawing.steps * len(job.pictures) for index, job in enumerate(jobs) if index not in known
        )
        done = 0
        began = told = time.perf_counter()

        def after_step(index: int, before: int, step: int, latents: Tensor) -> None:
            nonlocal told
            if stop.is_set():
                raise _StoppedError
            now = time.perf_counter()
            if now - told < SECONDS_BETWEEN_STEPS:
                return
            fraction = (before + step * len(latents)) / total
            left = (now - began) * (1 - fraction) / fraction
            tell(Step(index, fraction, left, sketches(self._pipeline, latents)))
            told = time.perf_counter()

        for index, job in enumerate(jobs):
            started = time.perf_counter()
            if index in known:
                tell(Drawn(index, known[index], time.perf_counter() - started))
                continue
            with self._active(job) as (name, scale):
                pictures = draw_batch(
                    self._pipeline,
                    name,
                    job.pictures,
                    job.drawing,
                    scale=scale,
                    on_step=partial(after_step, index, done),
                )
            done += job.drawing.steps * len(job.pictures)
            self._frames.keep(job, pictures)
            tell(Drawn(index, pictures, time.perf_counter() - started))

    @contextmanager
    def _active(self, job: Job) -> Iterator[tuple[str | None, float]]:
        """Within the block a job's method is active, blended and shaken: a name and a scale to draw with."""
        pipeline, name, scale = self._pipeline, self._names[job.method], job.scale
        with ExitStack() as stack:
            if job.parts or job.added:
                own = parts_of(pipeline, name) if name else {}
                factors = job.parts or tuple(own.values())
                scales = {part: scale * factor for part, factor in zip(own, factors, strict=True)}
                if job.added:
                    label, times = job.added
                    for part, factor in parts_of(pipeline, str(self._names[label])).items():
                        scales[part] = scales.get(part, 0.0) + times * factor
                name, scale = stack.enter_context(blended(pipeline, name, scales)), 1.0
            activate(pipeline, name, scale)
            if job.shake:
                stack.enter_context(shaken(pipeline, name, job.shake))
            yield name, scale


def _fingerprint(pipeline: StableDiffusionXLPipeline) -> str:
    """Of a base's weights: a few values of each, so that another base of the same name is told apart."""
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    values = [
        tensor.detach().flatten()[:4].float()
        for part in parts
        for name, tensor in part.named_parameters()
        if ".lora_" not in name
    ]
    return hashlib.sha256(torch.cat(values).cpu().numpy().tobytes()).hexdigest()


class _StoppedError(Exception):
    """Nobody waits for the pictures any longer."""
