"""What `benchmarks.quality` measures of a trained adapter."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality_arms import ASSETS, ATTENTION, PROMPT, Arm
from benchmarks.quality_measures import MEASURED_WITH, MEASURES, read_parts
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.data.images import Sample, find_samples
from flatlora_diffusion.data.latents import HELDOUT_TIMESTEPS, PromptCache
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, load_pipeline
from flatlora_diffusion.evaluate.denoising import DenoisingSet, embed
from flatlora_diffusion.evaluate.drawn import Drawer, Personalisation, Retention
from flatlora_diffusion.evaluate.flatness import expected_rise, top_eigenvalue
from flatlora_diffusion.evaluate.likeness import Likeness
from flatlora_diffusion.evaluate.merged import filters, merged_unet, replaced
from flatlora_diffusion.output.names import SUMMARY

RESOLUTION = 128
TIMESTEPS = 4
BANDS = 4
SIGMAS = (0.1, 0.3)
SIGMA = 0.1  # the paper's, at which inference scales are compared
DRAWS = 2
SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
OVER_SCALES = ("heldout_loss", "retention_loss", "train_loss", f"rise_{SIGMA}")
DRAWN_SCALES = (0.6, 0.8)
DRAWING = Drawing(RESOLUTION, RESOLUTION, steps=30, guidance=3.0)
ROUNDED = {"attention_4": (ATTENTION, 4), "attention_3": (ATTENTION, 3), "all_4": ("", 4)}  # name ends, bits
DRAWN = 32  # held-out captions, and as many of the base's own styles
CURVED = 8  # training icons in the Hessian

CONSTANTS: dict[str, tuple[Any, ...]] = {
    "losses": (RESOLUTION, HELDOUT_TIMESTEPS, TIMESTEPS, BANDS, SIGMAS, DRAWS, ATTENTION),
    "scales": (RESOLUTION, HELDOUT_TIMESTEPS, TIMESTEPS, SIGMA, DRAWS, ATTENTION, SCALES, OVER_SCALES),
    "rounded": (RESOLUTION, HELDOUT_TIMESTEPS, ROUNDED),
    "sharpness": (RESOLUTION, TIMESTEPS, CURVED, ATTENTION),
    "drawn": (DRAWING, DRAWN, DRAWN_SCALES),
}
"""Part -> what its values depend on besides the run: with other constants it is measured anew."""


def digest(part: str) -> str:
    """A short one of the constants that a part depends on, to be kept beside its values."""
    return hashlib.sha256(repr(CONSTANTS[part]).encode()).hexdigest()[:12]


def missing_parts(arm: Arm, folder: Path) -> set[str]:
    """Those of `quality_measures.PARTS` that a finished run still lacks, or has with other constants."""
    known, _ = read_parts(folder)
    wanted = ["losses", "rounded", *["scales"] * arm.over_scales, *["sharpness", "drawn"] * arm.featured]
    return {part for part in wanted if known.get(part, {}).get(MEASURED_WITH) != digest(part)}


class Measures:
    """The pictures that adapters are judged by, and the base; as they are loaded once.

    Args:
        work: Where the runs are, and drawn pictures go.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._base = str(ASSETS / "micro-sdxl")
        self._pipeline = load_pipeline(self._base)
        self._heldout_samples = find_samples(ASSETS / "icons-3d-heldout", PROMPT)
        self._retention_samples = find_samples(ASSETS / "icons-flat", PROMPT)
        self._heldout = self._set(self._heldout_samples, HELDOUT_TIMESTEPS)
        self._retained = self._set(self._retention_samples, TIMESTEPS)
        self._training: dict[Path, tuple[DenoisingSet, DenoisingSet]] = {}

    def _set(self, samples: list[Sample], count: int) -> DenoisingSet:
        return DenoisingSet(self._pipeline, samples, RESOLUTION, count)

    def measure(self, arm: Arm, folder: Path, parts: Sequence[str]) -> None:
        """Measure those parts of an arm's run that aren't measured yet, and add them to its file."""
        missing = missing_parts(arm, folder)
        for part in (part for part in parts if part in missing):
            found = getattr(self, part)(arm, folder)
            known, _ = read_parts(folder)
            known[part] = {MEASURED_WITH: digest(part), **found}
            write_atomically(folder / MEASURES, json.dumps(known, indent=1).encode())

    def losses(self, arm: Arm, folder: Path) -> dict[str, float]:
        """Losses, rise under noise, size of the update."""
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        load_adapter(self._pipeline, "adapter", folder)
        try:
            base, merged = (merged_unet(self._pipeline, name) for name in (None, "adapter"))
            relative = relative_update(base, merged, self._attention(merged))
            result = self._at_scale(arm, 1.0, SIGMAS)
            return result | {"update_norm": summary["mean_update_norm"], "relative_update": relative}
        finally:
            self._pipeline.delete_adapters("adapter")

    def scales(self, arm: Arm, folder: Path) -> dict[str, float]:
        """Losses and rise under noise over inference scales."""
        load_adapter(self._pipeline, "adapter", folder)
        try:
            curve = {scale: self._at_scale(arm, scale, [SIGMA]) for scale in SCALES}
        finally:
            self._pipeline.delete_adapters("adapter")
        return {
            f"scale_{scale}_{name}": values[name] for scale, values in curve.items() for name in OVER_SCALES
        }

    def rounded(self, arm: Arm, folder: Path) -> dict[str, float]:
        """The held-out loss with merged weights of few bits."""
        load_adapter(self._pipeline, "adapter", folder)
        try:
            unet, prompts = self._model("adapter", 1.0, self._training_sets(arm)[0])
        finally:
            self._pipeline.delete_adapters("adapter")
        losses = {}
        for name, (ends, bits) in ROUNDED.items():
            layers = [layer for layer in filters(unet) if layer.endswith(ends)]
            weights = {layer: round_weight(unet.get_submodule(layer).weight.data, bits) for layer in layers}
            with replaced(unet, weights):
                losses[f"rounded_{name}_heldout_loss"] = self._heldout.mean_loss(unet, prompts)
        return losses

    def _at_scale(self, arm: Arm, scale: float, sigmas: Sequence[float]) -> dict[str, float]:
        training, few = self._training_sets(arm)
        unet, prompts = self._model("adapter", scale, training)

        def loss(unet: nn.Module) -> float:
            return few.mean_loss(unet, prompts)

        heldout = self._heldout.losses(unet, prompts)
        bands = enumerate(self._heldout.bands(BANDS))
        rises = expected_rise(loss, unet, self._attention(unet), sigmas, DRAWS)
        return {
            "heldout_loss": heldout.mean().item(),
            **{f"heldout_loss_band_{k}": heldout[:, columns].mean().item() for k, (_, columns) in bands},
            "retention_loss": self._retained.mean_loss(unet, prompts),
            "train_loss": training.mean_loss(unet, prompts),
            **{f"rise_{rise.sigma}": rise.rise for rise in rises},
        }

    def sharpness(self, arm: Arm, folder: Path) -> dict[str, float]:
        """Largest eigenvalue of the training loss's Hessian, with respect to the attention's weights."""
        curved = self._set(find_samples(self._icons(arm), PROMPT)[:CURVED], TIMESTEPS)
        load_adapter(self._pipeline, "adapter", folder)
        try:
            unet, prompts = self._model("adapter", 1.0, curved)

            def parts(unet: nn.Module) -> Iterator[Tensor]:
                return curved.parts_of_mean(unet, prompts)

            value = top_eigenvalue(parts, unet, self._attention(unet))
            return {"top_eigenvalue": math.nan if value is None else value}
        finally:
            self._pipeline.delete_adapters("adapter")

    def drawn(self, arm: Arm, folder: Path) -> dict[str, float]:
        """CLIP-I, nearness to the training icons, CLIP-T and drift, from drawn pictures.

        Of plain arms at other inference scales too.
        """
        name = "-".join(folder.parts[-2:]).replace(".", "_")
        facts = load_adapter(self._pipeline, name, folder)
        try:
            # Several runs are measured at a time: none writes where another does, the base's pictures either.
            pictures = self._work.joinpath("pictures", *folder.parts[-2:])
            drawer = Drawer(self._pipeline, self._base, {name: facts}, DRAWING, pictures, batch_size=16)
            training = find_samples(self._icons(arm), PROMPT)
            heldout, kept = self._heldout_samples[:DRAWN], self._retention_samples[:DRAWN]
            personalisation = Personalisation(drawer, self._likeness, heldout, training)
            retention = Retention(drawer, self._likeness, [sample.caption for sample in kept])

            def at(scale: float) -> dict[str, float]:
                found = personalisation.measure(name, scale)
                nearest = found["nearest_training"]
                return {
                    "clip_i": found["clip_i"],
                    "nearest_training": nearest["drawn"],
                    "nearest_training_true": nearest["true"],
                    **retention.measure(name, scale),
                }

            result = at(1.0)
            if arm.against is None:
                curve = {1.0: result, **{scale: at(scale) for scale in DRAWN_SCALES}}
                scaled = {
                    f"scale_{scale}_{measure}": value
                    for scale, values in curve.items()
                    for measure, value in values.items()
                }
                result |= scaled | {"scale_0.0_drift": 0.0}  # the base's own
            return result
        finally:
            self._pipeline.delete_adapters(name)

    @cached_property
    def _likeness(self) -> Likeness:
        return Likeness(str(ASSETS / "micro-clip"))

    def _icons(self, arm: Arm) -> Path:
        return self._work / "few-icons" if arm.few_icons else ASSETS / "icons-3d"

    def _training_sets(self, arm: Arm) -> tuple[DenoisingSet, DenoisingSet]:
        """The arm's training icons: at the timesteps of the held-out ones, and at fewer."""
        folder = self._icons(arm)
        if folder not in self._training:
            samples = find_samples(folder, PROMPT)
            self._training[folder] = self._set(samples, HELDOUT_TIMESTEPS), self._set(samples, TIMESTEPS)
        return self._training[folder]

    def _model(
        self, adapter: str | None, scale: float, training: DenoisingSet
    ) -> tuple[nn.Module, PromptCache]:
        unet = merged_unet(self._pipeline, adapter, scale)
        captions = [*self._heldout.captions, *self._retained.captions, *training.captions]
        return unet, embed(self._pipeline, adapter, captions)

    @staticmethod
    def _attention(unet: nn.Module) -> list[str]:
        """The same layers for every arm, whichever it trained."""
        return [name for name in filters(unet) if name.endswith(ATTENTION)]


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight with each entry rounded to the nearest of `2^bits - 1` values.

    They lie evenly between the filter's largest magnitude and its negative, 0 among them: the plainest way of
    quantising a weight.
    """
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
    step = largest / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (weight / step).round() * step, weight)


def relative_update(base: nn.Module, merged: nn.Module, layers: Sequence[str]) -> float:
    """`||W' - W|| / ||W'||`, over the weights of some layers together.

    Flat-LoRA's noise has the expected square `sigma^2 ||W'||^2`, so sigma over this is its length relative to
    that of the update.

    Args:
        base: With the weights W.
        merged: With W'.
        layers: Names of linear or convolutional layers of both.
    """
    update = length = 0.0
    for name in layers:
        own, ours = (unet.get_submodule(name).weight.double() for unet in (base, merged))
        update += (ours - own).square().sum().item()
        length += ours.square().sum().item()
    return math.sqrt(update / length)
