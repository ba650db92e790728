"""What the flags of a grid ask for: a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.mix import Source
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data.datasets import dataset_captions
from flatlora_diffusion.data.folders import CAPTION_KEY
from flatlora_diffusion.data.images import PROMPT_PLACEHOLDER, complete_caption, find_samples
from flatlora_diffusion.draw.adapters import adapter_names
from flatlora_diffusion.draw.pipeline import Drawing, native_side_of
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.grid.plan import AXES, DRAWING_AXES, Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.sheet.command import expanded

_SDXL = 1024  # SDXL's own size, until `at_base_size` has asked the base
_PROMPT_SOURCES = ("prompt", "prompts_file", "captions", "dataset_name")
_WITH_A_MANIFEST = {"manifest", "output", "device", "batch_size"}


def read_recipe(given: dict[str, Any]) -> Recipe:
    """The grid that the flags ask for.

    Args:
        given: Flag without its dashes -> value, for each that was given.

    Raises:
        UserError: Names what is missing, wrong or too much.
    """
    if "manifest" in given:
        return _again(given)
    if "base" not in given:
        raise UserError("--base is missing; name the SDXL pipeline, or give the --manifest of a grid")
    adapters, methods = _methods(given.get("adapter", []), given.get("no_base", False))
    axes = {name: given[name] for name in ("rows", "columns") if name in given}
    varied = {name: given[name] for name in DRAWING_AXES if len(given.get(name, ())) > 1}
    if len(axes) == 1:
        (named,) = axes.values()
        rest = [axis for axis in (*AXES, *varied) if axis not in named]
        axes = {"rows": rest, "columns": rest} | axes
    resolution = given.get("resolution", _SDXL)
    own = ("negative_prompt", "caption_chunks", "transparent")
    drawing = {name: given[name] for name in own if name in given}
    drawing |= {name: given[name][0] for name in DRAWING_AXES if name in given}
    try:
        strip = expanded(given.get("strip", []))
    except ValueError as error:
        raise UserError(f"--strip: {error}") from error
    return Recipe(
        base=given["base"],
        grid=Grid(_prompts(given), given.get("seed", [0]), methods, **axes, **varied),
        drawing=Drawing(given.get("width", resolution), given.get("height", resolution), **drawing),
        adapters=adapters,
        vae=given.get("pretrained_vae_model_name_or_path"),
        footer="" if given.get("no_legend") else None,
        strip=strip,
        **{
            name: given[name]
            for name in ("dtype", "batch_size", "title", "cell_size", "margin")
            if name in given
        },
    )


def at_base_size(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The grid with pictures of the base's own size, where the flags say nothing else.

    Args:
        recipe: From `read_recipe`.
        given: The same flags.

    Raises:
        UserError: The base is missing or doesn't say its size.
    """
    missing = {"width", "height"} - given.keys()
    if not missing or not given.keys().isdisjoint({"manifest", "resolution"}):
        return recipe
    drawing = replace(recipe.drawing, **dict.fromkeys(missing, native_side_of(recipe.base)))
    return replace(recipe, drawing=drawing)


def _again(given: dict[str, Any]) -> Recipe:
    for name in sorted(given.keys() - _WITH_A_MANIFEST):
        raise UserError(f"--{name}: is in the manifest; leave it out, or leave --manifest out")
    recipe = Recipe.load(given["manifest"])
    return replace(recipe, batch_size=given.get("batch_size", recipe.batch_size))


def _methods(
    given: Sequence[tuple[str, Source, float]], no_base: bool
) -> tuple[dict[str, Source], list[Method]]:
    """The adapters by the names that they are loaded under, and the methods: the base first."""
    paths: dict[str, Source] = {}
    for label, path, _ in given:
        if paths.setdefault(label, path) != path:
            raise UserError(
                f"--adapter {label}={path}: {label} is {paths[label]} already; give it another name"
            )
    names = adapter_names(paths)
    labels = [label for label, _, _ in given]
    methods = [] if no_base else [Method(BASE)]
    for label, _, scale in given:
        shown = label if scale == 1 and labels.count(label) == 1 else f"{label} x {scale:g}"
        methods.append(Method(shown, names[label], scale))
    return {names[label]: path for label, path in paths.items()}, methods


def _prompts(given: dict[str, Any]) -> list[str]:
    sources = [name for name in _PROMPT_SOURCES if name in given]
    if len(sources) != 1:
        flags = ", ".join(f"--{name}" for name in _PROMPT_SOURCES)
        raise UserError(f"prompts come from one of {flags}; {len(sources) or 'none'} of them is given")
    source = sources[0]
    if source == "prompt":
        prompts = given["prompt"]
    else:
        found = _read_prompts(given["prompts_file"]) if source == "prompts_file" else _captions(given)
        prompts = list(dict.fromkeys(prompt for prompt in found if prompt.strip()))
    if not prompts:
        raise UserError(f"--{source} {given[source]}: no prompt in it")
    limit = given.get("limit", len(prompts))
    if limit < 1:
        raise UserError(f"--limit {limit}: must be greater than 0")
    return prompts[:limit]


def _captions(given: dict[str, Any]) -> list[str]:
    """The captions of a folder or dataset as training has them, but for those that say nothing."""
    instance_prompt = given.get("instance_prompt", PROMPT_PLACEHOLDER)
    if "captions" in given:
        flag, key = f"--captions {given['captions']}", given.get("caption_column", CAPTION_KEY)
        kohya = given.get("kohya_folders", False)
        samples = find_samples(given["captions"], instance_prompt, flag, key, kohya_folders=kohya)
        captions = [sample.caption for sample in samples]
    elif "caption_column" in given:
        flag = f"--dataset_name {given['dataset_name']}"
        own = dataset_captions(given["dataset_name"], given["caption_column"])
        captions = [complete_caption(caption, instance_prompt) for caption in own]
    else:
        raise UserError("--caption_column is missing; name the column of --dataset_name with the captions")
    captions = [caption for caption in captions if caption != PROMPT_PLACEHOLDER]
    if any(PROMPT_PLACEHOLDER in caption for caption in captions):
        raise UserError(
            f"{flag}: a caption has {PROMPT_PLACEHOLDER}; say with --instance_prompt what it means"
        )
    return captions


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"--prompts_file {path}: {str(error.strerror).lower()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {path}: not text in UTF-8 ({error.reason})") from error
    return [line for line in lines if not line.startswith("#")]
