"""Adapters and mixes of them, loaded from their files onto a pipeline under a name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

from flatlora_diffusion.adapter.check import check_adapter, check_loaded, converted
from flatlora_diffusion.adapter.facts import AdapterFacts, facts_of_mix
from flatlora_diffusion.adapter.mix import Mix, Source
from flatlora_diffusion.adapter.new_tokens import (
    load_embeddings,
    loaded_words,
    read_embeddings,
    remember_words,
)
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.active import remember_mix
from flatlora_diffusion.sdxl.lora import TEXT_ENCODERS


def load_adapter(pipeline: StableDiffusionXLPipeline, name: str, source: Source) -> AdapterFacts:
    """Load an adapter under a name, from its file or the folder that holds it, with its new tokens.

    An adapter that cannot be loaded leaves the pipeline without one of that name.

    Args:
        pipeline: Of the base.
        name: For `activate` and the like.
        source: The file, the folder, or a mix: several adapters that are active together under the name.

    Returns:
        What the file says of itself.

    Raises:
        UserError: The file or that of its new tokens is missing, damaged, or doesn't fit the base. Two
            adapters of a mix have new tokens for one word.
        ValueError: The pipeline has an adapter of that name.
    """
    if isinstance(source, Mix):
        return _load_mix(pipeline, name, source)
    return _load_file(pipeline, name, source)


def _load_mix(pipeline: StableDiffusionXLPipeline, name: str, mix: Mix) -> AdapterFacts:
    parts = {f"{name}_{number}": part for number, part in enumerate(mix.parts, start=1)}
    loaded: list[tuple[AdapterFacts, float]] = []
    words: dict[str, str] = {}
    try:
        for own, (path, scale) in parts.items():
            loaded.append((_load_file(pipeline, own, path), scale))
            learned = loaded_words(pipeline, own)
            if twice := sorted(words.keys() & learned.keys()):
                raise UserError(
                    f"{path}: has new tokens for {twice[0]}, as another adapter of the mix has; leave one out"
                )
            words |= learned
    except UserError:
        known = {own for names in pipeline.get_list_adapters().values() for own in names}
        pipeline.delete_adapters(sorted(known & parts.keys()))
        raise
    remember_words(pipeline, name, words)
    remember_mix(pipeline, name, {own: scale for own, (_, scale) in parts.items()})
    return facts_of_mix(loaded)


def _load_file(pipeline: StableDiffusionXLPipeline, name: str, path: Path) -> AdapterFacts:
    if any(name in names for names in pipeline.get_list_adapters().values()):
        raise ValueError(f"the pipeline has an adapter called {name!r}; unload it first")
    adapter = check_adapter(pipeline, path)
    file = adapter.file
    embeddings = read_embeddings(file, adapter.facts)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
            _load(pipeline, name, adapter)
        check_loaded(pipeline, name, adapter)
        load_embeddings(pipeline, name, adapter.facts, embeddings)
        # Layers that diffusers adds are in train(): those of other people's files may have dropout.
        for model in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
            model.eval()
    except (ValueError, KeyError, RuntimeError, UserError) as error:
        pipeline.delete_adapters(name)
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: doesn't fit this base ({reason[:300]})") from error
    return adapter


def adapter_names(labels: Iterable[str]) -> dict[str, str]:
    """Label -> a name to load its adapter under: one without dots, and none that a module has for its own."""
    return {label: f"adapter_{number}" for number, label in enumerate(labels, start=1)}


def _load(pipeline: StableDiffusionXLPipeline, name: str, adapter: AdapterFacts) -> None:
    """Have diffusers load a file that is in its format, or what the file of another format means."""
    other = converted(pipeline, adapter)
    if other is None:
        pipeline.load_lora_weights(
            str(adapter.file.parent),
            weight_name=adapter.file.name,
            adapter_name=name,
            use_safetensors=True,
            local_files_only=True,
        )
        return
    tensors, configs = other
    own: dict[str, Any] = {"network_alphas": None, "adapter_name": name, "metadata": configs}
    own |= {"_pipeline": pipeline, "low_cpu_mem_usage": True}
    if "unet" in adapter.parts:
        pipeline.load_lora_into_unet(tensors, unet=pipeline.unet, **own)
    for part in TEXT_ENCODERS:
        if part in adapter.parts:
            pipeline.load_lora_into_text_encoder(
                tensors, text_encoder=getattr(pipeline, part), prefix=part, **own
            )
