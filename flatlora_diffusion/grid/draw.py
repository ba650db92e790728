"""Grids of pictures: prompts x seeds x methods, drawn into a folder with their sheet and their manifest."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from flatlora_diffusion.common.devices import DTYPES, default_device
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.common.lock import check_writable, output_lock
from flatlora_diffusion.common.pictures import png_bytes
from flatlora_diffusion.common.processes import ALONE, Processes, require_shared
from flatlora_diffusion.draw import stamp
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, OnStep, draw_batch, load_pipeline, where_cut_in
from flatlora_diffusion.draw.samplers import sampler_name
from flatlora_diffusion.draw.stamp import A1111_CHUNK, Stamp, base_name, png, read
from flatlora_diffusion.grid.plan import Cell, Grid
from flatlora_diffusion.grid.recipe import Recipe, differences
from flatlora_diffusion.sheet.files import MANIFEST, Sheet, draw_sheet, read_manifest

logger = logging.getLogger(__name__)

SHEET_NAME = "sheet.png"

OnPicture = Callable[[int, int, Cell, Image.Image], None]
"""Called with each picture: how many there are with it, how many there will be, what it is, and itself."""


def draw_cells(
    pipeline: StableDiffusionXLPipeline,
    grid: Grid,
    drawing: Drawing,
    *,
    batch_size: int = 1,
    done: Collection[Cell] = (),
    on_step: OnStep | None = None,
) -> Iterator[tuple[Cell, Image.Image]]:
    """The pictures of a grid, one after the other.

    Which pictures are denoised together depends on the grid and `batch_size` alone, not on those that are
    there: what an interruption has left out comes out the same, also on GPUs.

    Args:
        pipeline: With the grid's adapters loaded.
        grid: What to draw.
        drawing: How, but for the settings that are axes of the grid.
        batch_size: Pictures denoised together. On the CPU it doesn't change a bit of them.
        done: Those that needn't be drawn.
        on_step: Told of every step of every batch (`draw_batch`).
    """
    for batch in grid.batches(batch_size):
        if all(cell in done for cell in batch):
            continue
        for cell, picture in zip(batch, _draw(pipeline, batch, drawing, on_step), strict=True):
            if cell not in done:
                yield cell, picture


def _draw(
    pipeline: StableDiffusionXLPipeline,
    batch: Sequence[Cell],
    drawing: Drawing,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """The pictures of a batch of `Grid.batches`."""
    method, how = batch[0].method, batch[0].drawing(drawing)
    wanted = [(cell.prompt, cell.seed) for cell in batch]
    return draw_batch(pipeline, method.adapter, wanted, how, scale=method.scale, on_step=on_step)


def draw_grid(
    recipe: Recipe,
    folder: Path,
    *,
    device: str | torch.device | None = None,
    sheet: Path | None = None,
    overwrite: bool = False,
    on_picture: OnPicture | None = None,
    flag: str = "--output",
    base_flag: str = "--base",
    processes: Processes = ALONE,
) -> Image.Image:
    """Draw a grid into a folder: its manifest first, then each picture, the sheet at last.

    Pictures of the same grid that are in the folder already are kept, so that after an interruption the same
    call does what is left.

    Args:
        recipe: What to draw.
        folder: Made where it doesn't exist.
        device: Such as cuda or cpu; by default the accelerator at hand.
        sheet: File for the sheet; `sheet.png` in the folder by default.
        overwrite: Replace another grid that is in the folder, instead of refusing it.
        on_picture: Told of every new picture. What it raises ends the drawing.
        flag: How the user named the folder, for errors.
        base_flag: How the user named the base, for errors.
        processes: Share out the batches; each calls this `together`. A picture is the same whichever draws
            it, and the main process alone writes the manifest and the sheet.

    Returns:
        The sheet.

    Raises:
        UserError: The sheet would be too large, the folder has another grid or is written to by another run,
            the base or an adapter cannot be loaded, an adapter isn't the one that the recipe asks for, or the
            disk is full, or doesn't have what other processes drew.
    """
    drawing = recipe.drawing
    device = torch.device(device or default_device())
    versions = stamp.versions()
    recipe.check_size()
    check_writable(flag, folder)
    if not overwrite:  # the adapters' hashes come later
        _check_folder(
            flag, folder, recipe, recipe.manifest(folder, drawing.sampler, device.type, {}, versions)
        )
    with output_lock(folder, flag) if processes.is_main else contextlib.nullcontext():
        processes.gather(None)  # nothing is loaded, nor written, where the main process has been refused
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: isn't there; all machines must share it")
        pipeline = load_pipeline(
            recipe.base,
            flag=base_flag,
            device=device,
            dtype=DTYPES[recipe.dtype],
            vae=recipe.vae,
            revision=recipe.revision,
            variant=recipe.variant,
        )
        hashes, mixed = {}, {}
        for name, path in recipe.adapters.items():
            facts = load_adapter(pipeline, name, path)
            hashes[name], mixed[name] = facts.sha256, facts.mixed
            if recipe.sha256.get(name, facts.sha256) != facts.sha256:
                raise UserError(
                    f"{facts.file}: isn't the file that the manifest's pictures were drawn with (SHA-256 "
                    f"{facts.sha256[:12]}..., then {recipe.sha256[name][:12]}...); restore it"
                )
        if not overwrite and processes.is_main:  # what a run draws into its own folder, it has told of before
            _tell_cut(pipeline, recipe)
        sampler = sampler_name(drawing.sampler, pipeline.scheduler)
        manifest = recipe.manifest(folder, sampler, device.type, hashes, versions)
        if processes.is_main:
            if overwrite:
                _make_room(folder, manifest)
            else:
                _check_folder(flag, folder, recipe, manifest)
            write_atomically(folder / MANIFEST, _json(manifest))
        stamps = {
            cell: _stamp(
                recipe,
                cell,
                sampler_name(cell.drawing(drawing).sampler, pipeline.scheduler),
                device.type,
                hashes,
                mixed,
                versions,
            )
            for batch in recipe.grid.batches(1)
            for cell in batch
        }
        _draw_missing(pipeline, recipe, folder, stamps, on_picture, processes)
        if processes.is_main:
            if processes.count > 1:
                missing = sum(not _has(folder / cell.file, own) for cell, own in stamps.items())
                require_shared("pictures", f"{flag} {folder}", missing)
            laid_out = draw_sheet(folder)
            write_atomically(sheet or folder / SHEET_NAME, sheet_png(recipe, laid_out, sampler, hashes))
            return laid_out
        return draw_sheet(folder)


def _draw_missing(
    pipeline: StableDiffusionXLPipeline,
    recipe: Recipe,
    folder: Path,
    stamps: Mapping[Cell, Stamp],
    on_picture: OnPicture | None,
    processes: Processes,
) -> None:
    """Draw the pictures that the folder lacks, batch by batch, each process its own."""
    # As the main process finds it: by the time that another looks there may be more.
    done = processes.from_main(
        lambda: {cell for cell, own in stamps.items() if _has(folder / cell.file, own)}
    )
    left = [batch for batch in recipe.grid.batches(recipe.batch_size) if not done.issuperset(batch)]
    if processes.is_main and processes.count > 1:
        logger.info("%d processes draw %d pictures", processes.count, len(stamps) - len(done))
    number = len(done)
    with tqdm(
        total=len(stamps), initial=number, desc="drawing", unit="picture", disable=not processes.is_main
    ) as progress:
        for batch in processes.turns(left):
            new = [cell for cell in batch or () if cell not in done]
            pictures = dict(zip(batch, _draw(pipeline, batch, recipe.drawing), strict=True)) if batch else {}
            for cell in new:
                write_atomically(folder / cell.file, png(pictures[cell], stamps[cell]))
                number += 1
                if on_picture is not None:
                    on_picture(number, len(stamps), cell, pictures[cell])
            progress.update(sum(processes.gather(len(new))))


def _tell_cut(pipeline: StableDiffusionXLPipeline, recipe: Recipe) -> None:
    """A line in the log for each prompt that is longer than the text encoders read."""
    drawing = recipe.drawing
    negative = [drawing.negative_prompt] if drawing.negative_prompt else []
    for prompt in (*dict.fromkeys(recipe.grid.prompts), *negative):
        found = (
            where_cut_in(pipeline, method.adapter, prompt, drawing.caption_chunks)
            for method in recipe.grid.methods
        )
        if told := next(filter(None, found), None):
            logger.warning("%s", told)


def _stamp(
    recipe: Recipe,
    cell: Cell,
    sampler: str,
    device: str,
    hashes: Mapping[str, str],
    mixed: Mapping[str, list[list[str | float]] | None],
    versions: dict[str, str],
) -> Stamp:
    drawing, method = cell.drawing(recipe.drawing), cell.method
    return Stamp(
        prompt=cell.prompt,
        negative_prompt=drawing.negative_prompt,
        seed=cell.seed,
        width=drawing.width,
        height=drawing.height,
        steps=drawing.steps,
        guidance=drawing.guidance,
        sampler=sampler,
        base=base_name(recipe.base),
        method=method.label,
        adapter_sha256=method.adapter and hashes[method.adapter],
        scale=None if method.adapter is None else method.scale,
        dtype=recipe.dtype,
        device=device,
        versions=versions,
        caption_chunks=drawing.caption_chunks,
        mix=None if method.adapter is None else mixed[method.adapter],
        transparent=drawing.transparent,
    )


def _has(file: Path, expected: Stamp) -> bool:
    """Whether a picture is there, whole, and was drawn like this."""
    try:
        return file.is_file() and read(file) == expected
    except UserError:
        return False


def _json(manifest: Mapping[str, Any]) -> bytes:
    # Names of files may hold bytes that are no text: escaped, they are JSON.
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _check_folder(flag: str, folder: Path, recipe: Recipe, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder whose files aren't those of this grid.

    Raises:
        UserError: Names the folder and what is in it.
    """
    path = folder / MANIFEST
    if path.exists():
        try:
            found = differences(read_manifest(path), json.loads(_json(manifest)))
        except ValueError as error:
            raise UserError(f"{flag} {folder}: {error}; give another folder") from error
        if found:
            raise UserError(f"{flag} {folder}: has a grid with other {', '.join(found)}; give another folder")
        return
    for name in (SHEET_NAME, *(cell.file for batch in recipe.grid.batches(1) for cell in batch)):
        if (folder / name).exists():
            raise UserError(f"{flag} {folder}: has a {name} of something else; give another folder")


def _make_room(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what an earlier grid has drawn into the folder, unless it is the same one."""
    try:
        old = read_manifest(folder / MANIFEST)
        if not differences(old, json.loads(_json(manifest))):
            return
        files = [file for row in Sheet.load(folder).rows for file in row.images]
    except ValueError:  # there is none that can be read
        return
    (folder / MANIFEST).unlink()
    for file in files:
        if file.parent == folder:
            file.unlink(missing_ok=True)


def sheet_png(recipe: Recipe, sheet: Image.Image, sampler: str, hashes: Mapping[str, str]) -> bytes:
    """A sheet as a PNG that says how its pictures were drawn, in A1111's form: prompts, then settings.

    Args:
        recipe: Of the grid.
        sheet: Its sheet.
        sampler: Name of the sampler.
        hashes: Name of an adapter -> SHA-256 of its file.
    """
    drawing = recipe.drawing
    methods = []
    for method in recipe.grid.methods:
        own = f"{hashes[method.adapter][:12]} x {method.scale:g}" if method.adapter else "no adapter"
        methods.append(f"{method.label} ({own})")
    lines = list(recipe.grid.prompts)
    if drawing.negative_prompt:
        lines.append(f"Negative prompt: {drawing.negative_prompt}")
    quoted = json.dumps(", ".join(methods), ensure_ascii=False)
    grid = recipe.grid
    steps = " ".join(map(str, grid.steps or [drawing.steps]))
    samplers = " / ".join(grid.sampler or [sampler])
    guidance = " ".join(f"{value:g}" for value in grid.guidance or [drawing.guidance])
    lines.append(
        f"Steps: {steps}, Sampler: {samplers}, CFG scale: {guidance}, "
        f"Seeds: {' '.join(map(str, recipe.grid.seeds))}, Size: {drawing.width}x{drawing.height}, "
        f"Model: {base_name(recipe.base)}, Methods: {quoted}"
    )
    info = PngInfo()
    info.add_text(A1111_CHUNK, "\n".join(lines))
    return png_bytes(sheet, info)
