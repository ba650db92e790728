"""An evaluation: the base and its adapters, measured part by part, each part once."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from flatlora_diffusion.adapter.facts import AdapterFacts
from flatlora_diffusion.common.devices import DTYPES, is_out_of_memory, out_of_memory_as_error, release
from flatlora_diffusion.common.pictures import png_bytes
from flatlora_diffusion.common.processes import ALONE, Processes, require_shared
from flatlora_diffusion.data.images import EmbeddedImage, Sample, digest
from flatlora_diffusion.data.latents import HELDOUT_TIMESTEPS
from flatlora_diffusion.draw.active import parts_of
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, load_pipeline, native_side
from flatlora_diffusion.draw.stamp import BASE, versions
from flatlora_diffusion.evaluate.denoising import DenoisingSet, embed
from flatlora_diffusion.evaluate.drawn import Drawer, Personalisation, Retention, fingerprint
from flatlora_diffusion.evaluate.flatness import (
    expected_rise,
    landscape_line,
    landscape_plane,
    top_eigenvalue,
)
from flatlora_diffusion.evaluate.kept import finite, merge, stored, write
from flatlora_diffusion.evaluate.likeness import Likeness
from flatlora_diffusion.evaluate.merged import adapted_layers, filters, merged_unet
from flatlora_diffusion.evaluate.plan import PARTS, Plan
from flatlora_diffusion.evaluate.strength import HELDOUT, RETENTION, recommend
from flatlora_diffusion.grid.plan import unique_slugs
from flatlora_diffusion.sdxl.base import check_scheduler
from flatlora_diffusion.sdxl.encoding import tell_cut

logger = logging.getLogger(__name__)

REPORT = "evaluation.json"
PICTURES = "pictures"
MEASURED = "measured"

BANDS = 4
TIMESTEPS = 4  # of each picture where many losses are taken
FLATNESS_PICTURES = 16
CURVED_PICTURES = 8  # in the Hessian
ITERATIONS = 60
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.5)
DRAWS = 4
LINE = tuple(round(-0.5 + 0.1 * k, 1) for k in range(11))
DIRECTIONS = 3
PLANE = tuple(round(-0.5 + 0.125 * k, 3) for k in range(9))
SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


class Evaluation:
    """Measures a plan into a folder, which keeps every part of every method as soon as it is measured.

    Args:
        plan: What.
        folder: Where the report, the parts and the drawn pictures go.
        processes: Share out the pictures, and then the parts.

    Attributes:
        report: `base`, `settings`, `methods`: label -> what was measured, the base first, and `left_out`: a
            line for each part that needs more memory than the device has.

    Raises:
        UserError: A model or an adapter is missing, damaged, or doesn't fit.
    """

    def __init__(self, plan: Plan, folder: Path, processes: Processes = ALONE) -> None:
        self.plan, self.folder, self.processes = plan, folder, processes
        self.likeness = Likeness(plan.clip, plan.device) if plan.clip and "drawn" in plan.parts else None
        self.pipeline = load_pipeline(plan.base, device=plan.device, dtype=DTYPES[plan.dtype])
        check_scheduler(f"--base {plan.base}", type(self.pipeline.scheduler).__name__)
        self.names: dict[str, str | None] = {BASE: None}
        self.facts: dict[str, AdapterFacts] = {}
        slugs = unique_slugs(label.replace(".", "-") for label in plan.adapters)  # PEFT takes no dots
        for slug, (label, path) in zip(slugs, plan.adapters.items(), strict=True):
            # Not `adapter_names`: kept pictures are in folders of this name, whatever others are measured.
            self.names[label] = name = f"adapter_{slug}"
            self.facts[name] = load_adapter(self.pipeline, name, path)
        samples = (*plan.heldout, *plan.training, *plan.retention)
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        told = [*(sample.caption for sample in samples), *plan.prompts]
        tell_cut(tokenizers, told, plan.caption_chunks)
        self.resolution = plan.resolution or native_side(self.pipeline)
        self.report: dict[str, Any] = {
            "base": plan.base,
            "settings": self._settings(),
            "methods": {label: {} for label in self.names},
            "left_out": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure what isn't measured yet; the report, which is in the folder too.

        It also has the parts that weren't asked for, where they were measured before in the same way.

        Raises:
            UserError: The folder cannot be written.
        """
        units = [(label, part) for part in PARTS for label in self.names if self._is_possible(part, label)]
        processes = self.processes
        todo = processes.from_main(lambda: [unit for unit in units if self._is_to_be_measured(*unit)])
        if processes.count > 1:
            if processes.is_main:
                logger.info(
                    "%d processes draw pictures together, then measure %d parts", processes.count, len(todo)
                )
            self._draw_together(todo)
        too_large: set[str] = set()
        done = len(units) - len(todo)
        with tqdm(total=len(units), initial=done, unit="part", disable=not processes.is_main) as bar:
            for own in processes.turns(todo):
                told = None
                if own is not None and own[1] not in too_large:
                    bar.set_description("{1} of {0}".format(*own))
                    told = self._measure(*own)
                for unit, line in processes.gather((own, told)):
                    bar.update(unit is not None)
                    if unit is not None and line is not None:
                        too_large.add(unit[1])
                        self.report["left_out"].append(line)
        if processes.is_main and processes.count > 1:
            lost = sum(part not in too_large and self._is_to_be_measured(label, part) for label, part in todo)
            require_shared("measured parts", f"--output {self.folder}", lost)
        for label, part in units:
            result = stored(self._file(part, label), self._key(part, label))
            if result is not None:
                merge(self.report["methods"][label], result)
        for measures in self.report["methods"].values():
            if strength := recommend(measures.get("tradeoff", ())):
                measures["recommended"] = asdict(strength)
        if processes.is_main:
            write(self.folder / REPORT, finite(self.report))
        return self.report

    def _is_to_be_measured(self, label: str, part: str) -> bool:
        result = stored(self._file(part, label), self._key(part, label))
        return part in self.plan.parts and (result is None or _lacks_pictures(result))

    def _measure(self, label: str, part: str) -> str | None:
        """Measure a part and keep it; a line where the memory doesn't suffice."""
        parts = {
            "losses": self._losses,
            "drawn": self._drawn,
            "flatness": self._flatness,
            "tradeoff": self._tradeoff,
            "sharpness": self._sharpness,
        }
        try:
            result = parts[part](label)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return (
                f"{part} of {label}: the memory of {self.plan.device} ran out; set --dtype bf16 "
                "or a smaller --resolution, or leave this part out with --parts"
            )
        finally:
            release()
        write(self._file(part, label), {"key": self._key(part, label), "result": result})
        return None

    def _draw_together(self, todo: Sequence[tuple[str, str]]) -> None:
        """Draw the pictures that parts will ask for, so that no two processes draw the same one."""
        wanted: dict[tuple[str | None, str], Sequence[tuple[str, int]]] = {}
        if todo and self.plan.prompts:  # they stand for the base's own styles, whatever is measured
            wanted[None, "retention"] = [(prompt, seed) for seed, prompt in enumerate(self.plan.prompts)]
        for label in (label for label, part in todo if part == "drawn"):
            wanted[self.names[label], "heldout"] = self._personalisation.wanted
            if self._trigger_free:
                for name in (None, self.names[label]):
                    wanted[name, "retention"] = self._kept_drawings.wanted
        with out_of_memory_as_error(
            "while pictures were drawn: --dtype bf16 or a smaller --resolution need less"
        ):
            for (name, _), pictures in wanted.items():
                self._drawer.draw(pictures, name, processes=self.processes)
        release()

    # The parts: each gives what it adds to a method's entry.

    def _losses(self, label: str) -> dict[str, Any]:
        unet, prompts = self._model(label)
        shown = self._heldout
        losses = shown.losses(unet, prompts)
        bands = [
            {"from": band.first, "to": band.end, "loss": losses[:, columns].mean().item()}
            for band, columns in shown.bands(BANDS)
        ]
        result: dict[str, Any] = {"heldout": {"loss": losses.mean().item(), "bands": bands}}
        if self._training:
            result["train_loss"] = self._training.mean_loss(unet, prompts)
        if self._retained:
            result["retention"] = {"loss": self._retained.mean_loss(unet, prompts)}
        return result

    def _drawn(self, label: str) -> dict[str, Any]:
        name = self.names[label]
        result = self._personalisation.measure(name)
        if self._trigger_free:
            result["retention"] = self._kept_drawings.measure(name)
        return result

    def _flatness(self, label: str) -> dict[str, Any]:
        unet, prompts = self._model(label)
        shown, layers, everything = self._flat_set, self._layers, filters(unet)

        def loss(unet: nn.Module) -> float:
            return shown.mean_loss(unet, prompts)

        rises = expected_rise(loss, unet, layers, SIGMAS, DRAWS) if layers else None
        return {
            "flatness": {
                "loss": loss(unet),
                "rise": rises and [asdict(rise) for rise in rises],
                "line": {
                    "alphas": list(LINE),
                    "losses": landscape_line(loss, unet, everything, LINE, DIRECTIONS),
                },
                "plane": {
                    "alphas": list(PLANE),
                    "losses": landscape_plane(loss, unet, everything, PLANE),
                },
            }
        }

    def _sharpness(self, label: str) -> dict[str, Any]:
        unet, prompts = self._model(label)
        shown = self._curved_set

        def parts(unet: nn.Module) -> Iterator[Tensor]:
            return shown.parts_of_mean(unet, prompts)

        # Second derivatives overflow in half precision.
        value = top_eigenvalue(parts, unet.float(), self._layers, iterations=ITERATIONS)
        return {"flatness": {"top_eigenvalue": value}}

    def _tradeoff(self, label: str) -> dict[str, Any]:
        return {"tradeoff": [self._at_scale(label, scale) for scale in SCALES]}

    def _at_scale(self, label: str, scale: float) -> dict[str, Any]:
        unet, prompts = self._model(label, scale)  # gone with this call: two would be too many for a GPU
        point: dict[str, Any] = {"scale": scale}
        kinds = {"heldout_loss": (self._heldout, HELDOUT), "retention_loss": (self._retained, RETENTION)}
        for name, (shown, by_picture) in kinds.items():
            if shown:
                losses = shown.losses(unet, prompts)
                point |= {name: losses.mean().item(), by_picture: losses.mean(1).tolist()}
        return point

    # What the parts need, made when it is first needed.

    def _model(self, label: str, scale: float = 1.0) -> tuple[nn.Module, Any]:
        """The merged UNet of a method, and the embeddings of all captions by its text encoders."""
        name = self.names[label]
        # Before the adapter is made the active one: this may draw with the base.
        samples = [*self.plan.heldout, *self.plan.training, *self._retention_samples]
        unet = merged_unet(self.pipeline, name, scale)
        return unet, embed(
            self.pipeline, name, [sample.caption for sample in samples], self.plan.caption_chunks
        )

    def _set(self, samples: Sequence[Sample], count: int) -> DenoisingSet:
        return DenoisingSet(self.pipeline, samples, self.resolution, count)

    @functools.cached_property
    def _heldout(self) -> DenoisingSet:
        return self._set(self.plan.heldout, HELDOUT_TIMESTEPS)

    @functools.cached_property
    def _training(self) -> DenoisingSet | None:
        return self._set(self.plan.training, HELDOUT_TIMESTEPS) if self.plan.training else None

    @functools.cached_property
    def _retained(self) -> DenoisingSet | None:
        return self._set(self._retention_samples, HELDOUT_TIMESTEPS) if self._retention_samples else None

    @property
    def _shown(self) -> Sequence[Sample]:
        return self.plan.training or self.plan.heldout

    @functools.cached_property
    def _flat_set(self) -> DenoisingSet:
        """What the loss surface is of: training pictures, or held-out ones where those aren't given."""
        return self._set(self._shown[:FLATNESS_PICTURES], TIMESTEPS)

    @functools.cached_property
    def _curved_set(self) -> DenoisingSet:
        """What the Hessian is of: some of the same, since it takes long."""
        return self._set(self._shown[:CURVED_PICTURES], TIMESTEPS)

    @functools.cached_property
    def _layers(self) -> list[str]:
        """The layers that any of the adapters changes: the same ones are perturbed in all."""
        parts = [part for name in self.facts for part in parts_of(self.pipeline, name)]
        return adapted_layers(self.pipeline.unet, parts)

    @functools.cached_property
    def _drawer(self) -> Drawer:
        plan, side = self.plan, self.resolution
        drawing = Drawing(side, side, plan.steps, plan.guidance, caption_chunks=plan.caption_chunks)
        return Drawer(self.pipeline, plan.base, self.facts, drawing, self.folder / PICTURES)

    @functools.cached_property
    def _personalisation(self) -> Personalisation:
        assert self.likeness is not None, "what is drawn is compared by a CLIP"
        return Personalisation(self._drawer, self.likeness, self.plan.heldout, self.plan.training)

    @functools.cached_property
    def _kept_drawings(self) -> Retention:
        assert self.likeness is not None, "what is drawn is compared by a CLIP"
        return Retention(self._drawer, self.likeness, self._trigger_free)

    @functools.cached_property
    def _trigger_free(self) -> list[str]:
        return list(self.plan.prompts) or [sample.caption for sample in self.plan.retention]

    @functools.cached_property
    def _retention_samples(self) -> list[Sample]:
        """Pictures of the base's own styles: those given, or what it draws for the prompts."""
        if self.plan.retention or not self.plan.prompts:
            return list(self.plan.retention)
        pictures = self._drawer.draw([(prompt, seed) for seed, prompt in enumerate(self.plan.prompts)])
        samples = []
        for prompt, picture in zip(self.plan.prompts, pictures, strict=True):
            content = functools.partial(png_bytes, picture)
            image = EmbeddedImage(prompt, f"the base's picture of {prompt!r}", content)
            samples.append(Sample(image, prompt))
        return samples

    # What decides whether a part has to be measured.

    def _is_possible(self, part: str, label: str) -> bool:
        if part == "drawn":
            return self.plan.clip is not None
        if part == "sharpness":
            return bool(self._layers)
        return part != "tradeoff" or label != BASE

    def _file(self, part: str, label: str) -> Path:
        place = list(self.names).index(label)
        return self.folder / MEASURED / f"{unique_slugs(self.names)[place]}-{part}.json"

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        samples = {
            name: {"pictures": len(found), "sha256": digest(list(found))} if found else None
            for name, found in (
                ("heldout", plan.heldout),
                ("training", plan.training),
                ("retention", plan.retention),
            )
        }
        return {
            "base_fingerprint": fingerprint(self.pipeline),
            "adapters": {
                label: self.facts[name].sha256 for label, name in self.names.items() if name is not None
            },
            **samples,
            "prompts": list(plan.prompts),
            # Only where it isn't 1: what was measured before there was a choice is kept.
            **({"caption_chunks": plan.caption_chunks} if plan.caption_chunks > 1 else {}),
            "resolution": self.resolution,
            "dtype": plan.dtype,
            "device": self.pipeline.device.type,
            "versions": versions(),
            "drawn": {"clip": plan.clip, "steps": plan.steps, "guidance": plan.guidance},
            "flatness": {
                "layers": len(self._layers),
                "of": "training" if plan.training else "heldout",
                "pictures": FLATNESS_PICTURES,
                "timesteps": TIMESTEPS,
                "draws": DRAWS,
            },
            "sharpness": {
                "pictures": CURVED_PICTURES,
                "timesteps": TIMESTEPS,
                "iterations": ITERATIONS,
            },
        }

    def _key(self, part: str, label: str) -> str:
        """A hash of all that decides what a part measures of a method."""
        settings = self.report["settings"]
        own = {name: value for name, value in settings.items() if name not in ("adapters", *PARTS)}
        if part == "drawn" or self.plan.prompts:
            own["drawing"] = settings["drawn"]
        if part == "flatness":
            own["flatness"] = [settings["flatness"], SIGMAS, LINE, DIRECTIONS, PLANE, self._layers]
        if part == "sharpness":
            own["sharpness"] = [settings["sharpness"], self._layers]
        content = [own, part, settings["adapters"].get(label), SCALES, BANDS, HELDOUT_TIMESTEPS]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _lacks_pictures(result: dict[str, Any]) -> bool:
    """Whether it is a trade-off that was measured before the losses of single pictures were kept."""
    return any(HELDOUT not in point for point in result.get("tradeoff", ()))
