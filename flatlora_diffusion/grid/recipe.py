"""All that decides a grid, and its form as JSON: the manifest from which it is drawn again."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.mix import Mix, Source
from flatlora_diffusion.common.devices import DTYPES
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.samplers import DEFAULT, SAMPLERS
from flatlora_diffusion.draw.stamp import base_name
from flatlora_diffusion.grid.plan import DRAWING_AXES, Grid, Method
from flatlora_diffusion.sheet.files import MANIFEST, STRIP_LABEL, Sheet, SheetRow, read_manifest

_KEY = "grid"  # of the manifest: what its sheet doesn't need
# What may change while the pictures stay the same (but for the last bits, where GPUs draw in other batches).
_WITHOUT_EFFECT = ("batch_size", "rows", "columns", "footer")


@dataclass(frozen=True)
class Recipe:
    """A grid: what is drawn, from which files, and how the sheet looks.

    Attributes:
        base: Folder or hub name of the SDXL pipeline.
        grid: Its methods name adapters out of `adapters`.
        drawing: How each picture is drawn.
        adapters: Name -> file, the folder that holds it, or several at once.
        dtype: Precision: `fp32`, `fp16` or `bf16`.
        revision: Of the base on the hub.
        variant: Of the base's files, such as `fp16`.
        vae: Folder or hub name of a VAE in place of the base's.
        batch_size: Pictures denoised together.
        title: Heading of the sheet.
        footer: Small print in place of the legend on how the pictures were drawn; empty for none at all.
        strip: Files of the training pictures.
        references: Prompt -> file of what it should look like, shown where each row has one prompt.
        cell_size: As for `contact_sheet`.
        margin: As for `contact_sheet`.
        sha256: Name of an adapter -> what its file must have, where that is known.

    Raises:
        UserError: A setting with which nothing can be drawn.
    """

    base: str
    grid: Grid
    drawing: Drawing
    adapters: Mapping[str, Source] = field(default_factory=dict)
    dtype: str = "fp32"
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    batch_size: int = 1
    title: str | None = None
    footer: str | None = None
    strip: Sequence[Path] = ()
    references: Mapping[str, Path] = field(default_factory=dict)
    cell_size: int | None = None
    margin: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cells in self.grid.batches(len(self.grid)):
            check_drawing(cells[0].drawing(self.drawing))
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be greater than 0")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        for method in self.grid.methods:
            if method.adapter is not None and method.adapter not in self.adapters:
                raise UserError(f"{method.label}: there is no adapter {method.adapter}")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a manifest, given its file or the folder that holds it.

        Raises:
            UserError: It is missing, damaged, or not of a grid.
        """
        path = path / MANIFEST if path.is_dir() else path
        try:
            sheet, content = Sheet.load(path), read_manifest(path).get(_KEY)
        except ValueError as error:
            raise UserError(str(error)) from error
        if content is None:
            raise UserError(f"{path}: tells of a sheet, but not how its pictures were drawn")
        folder = path.parent.resolve()
        try:
            axes = {name: content[name] for name in ("prompts", "seeds", "rows", "columns")}
            axes |= {name: content[name] for name in DRAWING_AXES if name in content}
            return cls(
                base=_read_path(content["base"], folder),
                grid=Grid(methods=[Method(**method) for method in content["methods"]], **axes),
                drawing=Drawing(**content["drawing"]),
                adapters={name: _read_source(own, folder) for name, own in content["adapters"].items()},
                sha256={name: own["sha256"] for name, own in content["adapters"].items() if own["sha256"]},
                vae=content["vae"] and _read_path(content["vae"], folder),
                **{name: content[name] for name in ("dtype", "revision", "variant", "batch_size", "footer")},
                references={
                    row["prompt"]: shown.reference
                    for row, shown in zip(read_manifest(path)["rows"], sheet.rows, strict=True)
                    if shown.reference
                },
                **{name: getattr(sheet, name) for name in ("title", "strip", "cell_size", "margin")},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged, or of another version of this project ({error})") from error

    def sheet(self, folder: Path, sampler: str) -> Sheet:
        """The sheet, with its pictures in a folder.

        Args:
            folder: Where the pictures are, or will be.
            sampler: What the small print calls the sampler.
        """
        grid = self.grid
        silent = self.footer == ""  # without any small print, labels say all
        references = self.references if "prompt" in grid.rows else {}
        return Sheet(
            columns=grid.labels(grid.columns, shared=silent),
            rows=[
                SheetRow(label, [folder / cell.file for cell in cells], references.get(cells[0].prompt))
                for label, cells in zip(grid.labels(grid.rows, shared=silent), grid.table(), strict=True)
            ],
            title=self.title,
            footer="" if silent else f"{self.footer or self._legend(sampler)}{self._shared()}",
            strip=self.strip,
            strip_label=STRIP_LABEL if self.strip else None,
            cell_size=self.cell_size,
            margin=self.margin,
        )

    def check_size(self) -> None:
        """Refuse a sheet that couldn't be made, before its pictures are drawn.

        Raises:
            UserError: It would be too large, or a file of the strip cannot be read.
        """
        try:
            self.sheet(Path(), self.drawing.sampler).size((self.drawing.width, self.drawing.height))
        except (ValueError, UserError) as error:
            raise UserError(f"nothing was drawn: {error}") from error

    def manifest(
        self, folder: Path, sampler: str, device: str, hashes: Mapping[str, str], versions: Mapping[str, str]
    ) -> dict[str, Any]:
        """The recipe as JSON.

        Args:
            folder: That of the manifest: files are named relative to it.
            sampler: Name of the sampler.
            device: Kind of the device that draws.
            hashes: Name of an adapter -> SHA-256 of its file.
            versions: Package -> version.
        """
        sheet, folder = self.sheet(folder, sampler), folder.resolve()
        rows = []
        for row, cells in zip(sheet.rows, self.grid.table(), strict=True):
            of_first = {"prompt": cells[0].prompt, "seed": cells[0].seed, **dict(cells[0].settings)}
            place = {axis: of_first[axis] for axis in self.grid.rows if axis != "method"}
            shown = {"reference": _relative(row.reference, folder)} if row.reference else {}
            rows.append({"label": row.label, "images": [cell.file for cell in cells], **place, **shown})
        measures = {"cell_size": self.cell_size, "margin": self.margin}
        texts = {
            "title": self.title,
            "footer": sheet.footer,
            "strip": [_relative(path, folder) for path in self.strip],
            "strip_label": sheet.strip_label,
        }
        return {
            "columns": sheet.columns,
            "rows": rows,
            **{name: value for name, value in texts.items() if value},
            **{name: value for name, value in measures.items() if value is not None},
            _KEY: {
                "base": _written_path(self.base, folder),
                "revision": self.revision,
                "variant": self.variant,
                "vae": self.vae and _written_path(self.vae, folder),
                "dtype": self.dtype,
                "device": device,
                "versions": dict(versions),
                "drawing": dataclasses.asdict(self.drawing),
                "prompts": self.grid.prompts,
                "seeds": self.grid.seeds,
                **{axis: getattr(self.grid, axis) for axis in self.grid.settings_axes},
                "methods": [dataclasses.asdict(method) for method in self.grid.methods],
                "adapters": {
                    name: {**_written_source(source, folder), "sha256": hashes.get(name)}
                    for name, source in self.adapters.items()
                },
                "batch_size": self.batch_size,
                "rows": self.grid.rows,
                "columns": self.grid.columns,
                "footer": self.footer,
            },
        }

    def _legend(self, sampler: str) -> str:
        """How all pictures were drawn."""
        grid, drawing = self.grid, self.drawing
        own = {
            "steps": f"{drawing.steps} steps",
            "guidance": f"guidance {drawing.guidance:g}",
            "sampler": "the base's own sampler" if sampler == DEFAULT else sampler,
        }
        parts = [
            base_name(self.base),
            *(told for axis, told in own.items() if axis not in grid.settings_axes),
            *(f"{drawing.width} x {drawing.height} px", self.dtype),
        ]
        if drawing.caption_chunks > 1:
            parts.append(f"prompts in {drawing.caption_chunks} pieces")
        if drawing.transparent:
            parts.append("transparent ground")
        mixes = {name for name, source in self.adapters.items() if isinstance(source, Mix)}
        alone = [method for method in grid.methods if method.adapter and method.adapter not in mixes]
        silent = [method for method in alone if not method.label.endswith(f" x {method.scale:g}")]
        if len({method.scale for method in silent}) == 1:
            parts.append(f"adapter scale {silent[0].scale:g}")
        else:
            parts += [f"{method.label} at scale {method.scale:g}" for method in silent]
        for method in grid.methods:
            source = self.adapters.get(method.adapter or "")
            if isinstance(source, Mix):
                told = [f"{base_name(str(path))} x {scale:g}" for path, scale in source.parts]
                parts.append(f"{method.label} = {' + '.join(told)}")
        return ", ".join(parts) + (
            "" if "seed" in grid.shared() else "; the same initial noise for each seed"
        )

    def _shared(self) -> str:
        """What stands once in the small print instead of at each row and column."""
        grid, shared = self.grid, self.grid.shared()
        text = f"; seed {grid.seeds[0]}" if "seed" in shared else ""
        text += f"; {grid.methods[0].label}" if "method" in shared else ""
        text += f"\nprompt: {grid.prompts[0]}" if "prompt" in shared else ""
        negative = self.drawing.negative_prompt
        return text + (f"\nnegative prompt: {negative}" if negative else "")


def check_drawing(drawing: Drawing) -> None:
    """Refuse settings with which nothing can be drawn.

    Raises:
        UserError: Names the setting.
    """
    for name in ("width", "height"):
        value = getattr(drawing, name)
        if value < 8 or value % 8:
            raise UserError(f"{name} {value}: must be a multiple of 8 greater than 0")
    for name in ("steps", "caption_chunks"):
        if getattr(drawing, name) < 1:
            raise UserError(f"{name} {getattr(drawing, name)}: must be greater than 0")
    if not 0 <= drawing.guidance < math.inf:
        raise UserError(f"guidance {drawing.guidance}: must be a finite number that is 0 or more")
    if drawing.sampler not in SAMPLERS:
        raise UserError(f"sampler {drawing.sampler}: must be one of {', '.join(SAMPLERS)}")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of two manifests gives different pictures. A hash that isn't known is that of any file.

    Args:
        one: As read from JSON.
        other: As read from JSON.

    Returns:
        Names of settings; all pictures are the same where there are none.
    """
    try:
        (ours, our_hashes), (theirs, their_hashes) = _deciding(one[_KEY]), _deciding(other[_KEY])
    except (KeyError, TypeError, AttributeError, ValueError):
        return ["settings"]
    found = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    known = [name for name, sha256 in our_hashes.items() if sha256 and their_hashes.get(name)]
    if any(our_hashes[name] != their_hashes[name] for name in known):
        found.append("adapter files")
    return found


def _deciding(grid: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """What of a manifest decides its pictures: settings, and the hashes of the adapters."""
    settings = {name: value for name, value in grid.items() if name not in _WITHOUT_EFFECT}
    hashes = {name: file["sha256"] for name, file in settings.pop("adapters").items()}
    drawing = Drawing(**settings.pop("drawing"))  # an older manifest doesn't have all that there is now
    return settings | dataclasses.asdict(drawing), hashes


def _written_source(source: Source, folder: Path) -> dict[str, Any]:
    """An adapter as JSON, with paths relative to a folder."""
    if isinstance(source, Mix):
        return {"mix": [{"file": _relative(path, folder), "scale": scale} for path, scale in source.parts]}
    return {"file": _relative(source, folder)}


def _read_source(written: Mapping[str, Any], folder: Path) -> Source:
    """The inverse."""
    if "mix" in written:
        return Mix(tuple((Path(_read_path(p["file"], folder)), p["scale"]) for p in written["mix"]))
    return Path(_read_path(written["file"], folder))


def _relative(path: Path, folder: Path) -> str:
    """The path from a resolved folder; links are followed, so that `..` leads back."""
    return os.path.relpath(path.resolve(), folder)


def _written_path(name: str, folder: Path) -> str:
    """A local folder relative to another one, beginning with a dot; the name of one on the hub as it is."""
    if not Path(name).exists():
        return name
    relative = _relative(Path(name), folder)
    return relative if relative.startswith(".") else f"./{relative}"


def _read_path(written: str, folder: Path) -> str:
    """The inverse: a relative path of the manifest in a folder, from here."""
    return os.path.normpath(folder / written) if written.startswith(".") else written
