"""The one loader of SDXL bases, for training and for drawing: what is missing or damaged is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.models import check_vocabulary, check_weights, load_whole, local_folder
from flatlora_diffusion.sdxl.lora import TEXT_ENCODERS
from flatlora_diffusion.sdxl.shapes import check_parts, check_shapes, check_tokens, check_vae
from flatlora_diffusion.sdxl.single_file import SingleFile, is_single_file, load_single_vae

logger = logging.getLogger(__name__)

BASE_FLAG = "--pretrained_model_name_or_path"  # of the trainer; other commands have another


@dataclass
class Base:
    """The parts of an SDXL pipeline, all frozen.

    Attributes:
        tokenizers: Of both text encoders.
        text_encoders: Both; empty once they have left memory.
        vae: Images to latents and back; None once it has left memory.
        unet: Predicts the noise.
        noise_scheduler: Noise levels of training.
        sampler: The pipeline's own scheduler, for pictures.
        zeros_for_empty_prompt: Whether the pipeline replaces the embeddings of an empty prompt by zeros.
    """

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection] | tuple[()]
    vae: AutoencoderKL | None
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampler: SchedulerMixin
    zeros_for_empty_prompt: bool

    def pipeline(self) -> StableDiffusionXLPipeline:
        """The pipeline of these very parts, those that are still in memory, without progress bars."""
        text_encoder, text_encoder_2 = self.text_encoders or (None, None)
        # The pipeline takes None for what isn't there, and any scheduler; its types don't say so.
        parts: dict[str, Any] = {
            "vae": self.vae,
            "unet": self.unet,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": self.tokenizers[0],
            "tokenizer_2": self.tokenizers[1],
            "scheduler": self.sampler,
        }
        pipeline = StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=self.zeros_for_empty_prompt, add_watermarker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def check_base(name: str, flag: str = BASE_FLAG) -> None:
    """Refuse what isn't an SDXL pipeline with safetensors, before anything is loaded.

    A name that is no local path is taken for a repository of the hub and checked when it is loaded.

    Args:
        name: Folder or hub name of a pipeline in the diffusers format, or a single file.
        flag: How the user named it, for errors.

    Raises:
        UserError: Says what was met and what to give instead.
    """
    flag = f"{flag} {name}"
    if is_single_file(name):
        SingleFile(flag, Path(name), own_vae=True)
        return
    path = local_folder(flag, name, "give a folder in the diffusers format, or a single .safetensors file")
    if path is None:
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{flag}: no model_index.json in it; give an SDXL pipeline in the diffusers format")
    try:
        settings = json.loads(index.read_text(encoding="utf-8"))
        kind = settings["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from error
    _check_kind(flag, kind)
    check_parts(flag, settings)
    for part in ("unet", "vae", *TEXT_ENCODERS):
        check_weights(flag, path / part)


def load_tokenizers(name: str, flag: str = BASE_FLAG) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of a base that isn't loaded.

    Args:
        name: As for `check_base`.
        flag: The same.

    Raises:
        UserError: The base or its vocabulary is missing or damaged.
    """
    check_base(name, flag)
    flag = f"{flag} {name}"
    file = SingleFile(flag, Path(name), own_vae=True) if is_single_file(name) else None

    def load(folder: str) -> CLIPTokenizer:
        if file:
            return file.part(CLIPTokenizer, folder)
        tokenizer = load_whole(f"{flag}: {folder}", CLIPTokenizer.from_pretrained, name, subfolder=folder)
        check_vocabulary(f"{flag}: {folder}", tokenizer)
        return tokenizer

    return load("tokenizer"), load("tokenizer_2")


def _check_kind(flag: str, kind: str) -> None:
    if not str(kind).startswith("StableDiffusionXL"):
        raise UserError(f"{flag}: a {kind}, not an SDXL pipeline; give an SDXL base (not SD 1.5 or 2)")


def load_base(
    name: str,
    *,
    flag: str = BASE_FLAG,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    to_draw: bool = False,
) -> Base:
    """Load an SDXL base from a folder, a single file or the hub, safetensors only.

    Args:
        name: Folder or hub name of a pipeline in the diffusers format, or a single file of an SDXL base.
        flag: How the user named it, for errors.
        dtype: Precision of the UNet and the text encoders; the VAE is always in float32.
        vae: Folder or hub name of a VAE to use in place of the pipeline's; see `load_vae`.
        revision: Revision on the hub.
        variant: Variant of the weight files.
        to_draw: No loss will be taken with it, so it needn't pass `check_scheduler`.

    Raises:
        UserError: Something is missing, damaged or not SDXL.
    """
    check_base(name, flag)
    flag = f"{flag} {name}"
    file = SingleFile(flag, Path(name), own_vae=vae is not None) if is_single_file(name) else None
    home, revision = (str(file.configurations), None) if file else (name, revision)
    index = load_whole(flag, StableDiffusionXLPipeline.load_config, home, revision=revision)
    _check_kind(flag, index.get("_class_name", "repository without a pipeline"))
    check_parts(flag, index)

    def part(kind: Any, folder: str, **settings: Any) -> Any:
        if file:
            return file.part(kind, folder, **settings)
        return load_whole(
            f"{flag}: {folder}", kind.from_pretrained, name, subfolder=folder, revision=revision, **settings
        )

    scheduler = str((index.get("scheduler") or [None, None])[1])
    if not to_draw:
        check_scheduler(flag, scheduler)
    weights = {"variant": variant, "use_safetensors": True, "dtype": dtype}
    sampler = getattr(diffusers, scheduler, None)
    if sampler is None:
        raise UserError(f"{flag}: model_index.json names no scheduler of diffusers: {index.get('scheduler')}")
    text_configs = _check_before_weights(flag, home, revision, vae, file.unet_channels if file else {})
    tokenizers = part(CLIPTokenizer, "tokenizer"), part(CLIPTokenizer, "tokenizer_2")
    for tokenizer, folder, config in zip(tokenizers, ("tokenizer", "tokenizer_2"), text_configs, strict=True):
        check_vocabulary(f"{flag}: {folder}", tokenizer)
        check_tokens(f"{flag}: {folder}", tokenizer, config)
    precise = {**weights, "dtype": torch.float32}
    base = Base(
        tokenizers=tokenizers,
        text_encoders=(
            part(CLIPTextModel, "text_encoder", **weights),
            part(CLIPTextModelWithProjection, "text_encoder_2", **weights),
        ),
        vae=load_vae(vae, revision, variant) if vae else part(AutoencoderKL, "vae", **precise),
        unet=part(UNet2DConditionModel, "unet", **weights),
        noise_scheduler=part(DDPMScheduler, "scheduler"),
        sampler=part(sampler, "scheduler"),
        zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
    )
    for model in (*base.text_encoders, base.vae, base.unet):
        assert model is not None, "all of them have just been loaded"
        model.requires_grad_(False)
    return base


def _check_before_weights(
    flag: str, name: str, revision: str | None, vae: str | None, channels: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare the shapes of all parts; the configurations of both text encoders.

    Args:
        flag: Names the base.
        name: Folder or hub name of the configurations.
        revision: On the hub.
        vae: As for `load_base`.
        channels: What the UNet's weights say of themselves, in place of its configuration.
    """

    def config(kind: Any, folder: str) -> dict[str, Any]:
        return load_whole(f"{flag}: {folder}", kind.load_config, name, subfolder=folder, revision=revision)

    def text_config(folder: str) -> dict[str, Any]:
        load = CLIPTextConfig.from_pretrained
        return load_whole(f"{flag}: {folder}", load, name, subfolder=folder, revision=revision).to_dict()

    one, two = text_config("text_encoder"), text_config("text_encoder_2")
    own_vae = (
        _load_as_base(AutoencoderKL.load_config, vae, {"revision": revision})
        if vae and not is_single_file(vae)
        else config(AutoencoderKL, "vae")
    )
    check_vae(_vae_flag(vae) if vae else f"{flag}: vae", own_vae)
    check_shapes(flag, {**config(UNet2DConditionModel, "unet"), **channels}, own_vae, one, two)
    return one, two


def check_scheduler(flag: str, scheduler: str) -> None:
    """Refuse bases whose loss isn't the one that `diffusion_losses` takes; pictures can be drawn with them.

    Args:
        flag: Names the base.
        scheduler: Class of its scheduler.

    Raises:
        UserError: It is one for EDM-style training or flow matching.
    """
    for kind, name in (("EDM", "EDM-style"), ("FlowMatch", "flow-matching")):  # Playground v2.5, say
        if kind in scheduler:
            raise UserError(
                f"{flag}: its scheduler is {scheduler}, and {name} training isn't done here: loss and "
                "measures are made for SDXL's timesteps; train it with its own script, or give an SDXL base"
            )


def load_vae(name: str, revision: str | None = None, variant: str | None = None) -> AutoencoderKL:
    """A VAE in float32 from a folder, a single file or the hub.

    Args:
        name: Folder or hub name, or a single file in the names of diffusers or of the original repository.
        revision: That of the base. The VAE needn't have one that is called so; the log tells.
        variant: The same.

    Raises:
        UserError: It is missing or damaged.
    """
    if is_single_file(name):
        return load_single_vae(_vae_flag(name), Path(name), AutoencoderKL)
    if variant and Path(name).is_dir() and not any(Path(name).glob(f"*.{variant}*safetensors*")):
        logger.info("%s: no variant %s there; loaded without", _vae_flag(name), variant)
        variant = None
    wanted = {"variant": variant, "revision": revision}
    weights = {"use_safetensors": True, "dtype": torch.float32}
    return _load_as_base(AutoencoderKL.from_pretrained, name, wanted, **weights)


def _load_as_base(load: Callable[..., Any], vae: str, wanted: dict[str, str | None], **settings: Any) -> Any:
    """Call a loader for an own VAE with the base's revision and variant, and without those that it lacks."""
    flag, given = _vae_flag(vae), {name: value for name, value in wanted.items() if value}
    try:
        return load_whole(flag, load, vae, **given, **settings)
    except UserError:
        if not given:
            raise
        name, value = next(iter(given.items()))
        loaded = _load_as_base(load, vae, {**given, name: None}, **settings)
        logger.info("%s: no %s %s there; loaded without", flag, name, value)
        return loaded


def _vae_flag(name: str) -> str:
    return f"--pretrained_vae_model_name_or_path {name}"
