"""Everything about Stable Diffusion XL: loading and checking a base, latents, prompts, LoRA, the loss."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flatlora_diffusion.errors import UserError
from flatlora_diffusion.noise import hash64

logger = logging.getLogger(__name__)

ADAPTER = "default"
FROZEN_ADAPTER = "initial"  # takes away the update that some initialisations start with; see initial.py
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass
class Base:
    """The parts of an SDXL pipeline that training needs, all frozen.

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
    text_encoders: tuple[nn.Module, ...]
    vae: AutoencoderKL | None
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampler: SchedulerMixin
    zeros_for_empty_prompt: bool


@dataclass(frozen=True)
class Latents:
    """What the VAE's encoder says of some images: a normal distribution for each latent value, scaled.

    Attributes:
        mean: (images, channels, height, width), float32.
        std: The same shape.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """What the UNet is told of some prompts.

    Attributes:
        tokens: (prompts, tokens, features of both encoders).
        pooled: (prompts, features of the second encoder).
    """

    tokens: Tensor
    pooled: Tensor


def check_base(name: str) -> None:
    """Refuse what isn't an SDXL pipeline in the diffusers format with safetensors, before anything is loaded.

    A name that is no local path is taken for a repository of the hub and checked when it is loaded.

    Raises:
        UserError: Says what was met and what to give instead.
    """
    flag = f"--pretrained_model_name_or_path {name}"
    path = Path(name)
    if path.is_file():
        raise UserError(
            f"{flag}: a single file; give a folder in the diffusers format "
            "(StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one)"
        )
    if not path.is_dir():
        if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise UserError(f"{flag}: no such folder")
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{flag}: no model_index.json in it; give an SDXL pipeline in the diffusers format")
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from error
    _check_kind(flag, kind)
    for part in ("unet", "vae", *TEXT_ENCODERS):
        folder = path / part
        if not any(folder.glob("*.safetensors")):
            met = (
                "only pickled weights (.bin), which can run code"
                if any(folder.glob("*.bin"))
                else "no weights"
            )
            raise UserError(f"{flag}: {met} in {part}/; give a base saved as safetensors")


def _check_kind(flag: str, kind: str) -> None:
    if not str(kind).startswith("StableDiffusionXL"):
        raise UserError(f"{flag}: a {kind}, not an SDXL pipeline; give an SDXL base (not SD 1.5 or 2)")


def load_base(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Base:
    """Load an SDXL base from a folder or the hub, safetensors only.

    Args:
        name: Folder or hub name of the pipeline.
        dtype: Precision of the UNet and the text encoders; the VAE is always in float32.
        vae: Folder or hub name of a VAE to use in place of the pipeline's.
        revision: Revision on the hub.
        variant: Variant of the weight files.

    Raises:
        UserError: Something is missing, damaged or not SDXL.
    """
    check_base(name)
    flag = f"--pretrained_model_name_or_path {name}"
    index = _load(flag, StableDiffusionXLPipeline.load_config, name, revision=revision)
    _check_kind(flag, index.get("_class_name", "repository without a pipeline"))

    def part(kind: Any, folder: str, **settings: Any) -> Any:
        return _load(
            f"{flag}: {folder}", kind.from_pretrained, name, subfolder=folder, revision=revision, **settings
        )

    scheduler = str((index.get("scheduler") or [None, None])[1])
    check_scheduler(flag, scheduler)
    weights = {"variant": variant, "use_safetensors": True, "dtype": dtype}
    sampler = getattr(diffusers, scheduler, None)
    if sampler is None:
        raise UserError(f"{flag}: model_index.json names no scheduler of diffusers: {index.get('scheduler')}")
    precise = {**weights, "dtype": torch.float32}
    base = Base(
        tokenizers=(part(CLIPTokenizer, "tokenizer"), part(CLIPTokenizer, "tokenizer_2")),
        text_encoders=(
            part(CLIPTextModel, "text_encoder", **weights),
            part(CLIPTextModelWithProjection, "text_encoder_2", **weights),
        ),
        vae=load_vae(vae) if vae else part(AutoencoderKL, "vae", **precise),
        unet=part(UNet2DConditionModel, "unet", **weights),
        noise_scheduler=part(DDPMScheduler, "scheduler"),
        sampler=part(sampler, "scheduler"),
        zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
    )
    if base.unet.config.addition_embed_type != "text_time":
        raise UserError(f"{flag}: its UNet takes no text and time embedding, so it isn't SDXL's")
    for tokenizer, folder in zip(base.tokenizers, ("tokenizer", "tokenizer_2"), strict=True):
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise UserError(
                f"{flag}: {folder}/ has no vocabulary (tokenizer.json, or vocab.json and merges.txt)"
            )
    for model in (*base.text_encoders, base.vae, base.unet):
        model.requires_grad_(False)
    return base


def check_scheduler(flag: str, scheduler: str) -> None:
    """Refuse bases whose loss isn't the one that `diffusion_losses` takes.

    Args:
        flag: Names the base.
        scheduler: Class of its scheduler.

    Raises:
        UserError: It is one for EDM-style training or flow matching.
    """
    for kind, name in (("EDM", "EDM-style"), ("FlowMatch", "flow-matching")):  # Playground v2.5, say
        if kind in scheduler:
            raise UserError(f"{flag}: its scheduler is {scheduler}, and {name} training isn't done here")


def load_vae(name: str) -> AutoencoderKL:
    """A VAE in float32 from a folder or the hub.

    Raises:
        UserError: It is missing or damaged.
    """
    flag = f"--pretrained_vae_model_name_or_path {name}"
    return _load(flag, AutoencoderKL.from_pretrained, name, use_safetensors=True, dtype=torch.float32)


def _load(what: str, load: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Call a loader of diffusers or transformers; its complaint becomes one line."""
    try:
        if "use_safetensors" not in settings:  # no weights: a tokenizer, a scheduler
            return load(*arguments, **settings)
        model, report = load(*arguments, **settings, output_loading_info=True)
        if report["missing_keys"]:  # the libraries would go on with random values in their place
            missing = sorted(report["missing_keys"])
            raise UserError(f"{what}: {len(missing)} weights are missing from its files ({missing[0]}, ...)")
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: cannot be loaded ({reason[:300]})") from error


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Latents:
    """Latents of images (N, 3, height, width) in [-1, 1], in the scale in which the UNet sees them."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    channel_mean, channel_std = (
        torch.tensor(values, device=mean.device).view(1, -1, 1, 1) if values is not None else neutral
        for values, neutral in ((vae.config.latents_mean, 0.0), (vae.config.latents_std, 1.0))
    )
    scale = vae.config.scaling_factor / channel_std
    return Latents((mean - channel_mean) * scale, std * scale)


def encode_prompts(
    tokenizers: Sequence[CLIPTokenizer], text_encoders: Sequence[nn.Module], prompts: Sequence[str]
) -> PromptEmbeds:
    """Embeddings of prompts: both encoders' hidden states but for the last layer, the second one's pooled."""
    hidden = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        device = next(text_encoder.parameters()).device
        output = text_encoder(ids.to(device), output_hidden_states=True, return_dict=True)
        hidden.append(output.hidden_states[-2])
    return PromptEmbeds(torch.cat(hidden, dim=-1), output.text_embeds)


def diffusion_losses(
    unet: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompts: PromptEmbeds,
    time_ids: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise (or velocity, as the base's scheduler says), (N,) float32.

    Args:
        unet: SDXL's UNet, wrapped or not.
        noise_scheduler: Gives the noise levels and the kind of prediction.
        latents: (N, channels, height, width), without noise.
        noise: The same shape, unit normals.
        timesteps: (N,), whole numbers.
        prompts: Embeddings of N prompts.
        time_ids: (N, 6): original height and width, top and left of the crop, target height and width.
        snr_gamma: Weight each sample's error by `min_snr_weights`.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    conditions = {"text_embeds": prompts.pooled, "time_ids": time_ids}
    noisy = noisy.to(prompts.tokens.dtype)  # that of the frozen base
    predicted = unet(noisy, timesteps, prompts.tokens, added_cond_kwargs=conditions, return_dict=False)[0]
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise UserError(
            f"the base's scheduler predicts {kind!r}; only epsilon and v_prediction can be trained"
        )
    errors = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        errors = errors * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
    return errors


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR loss weights (arXiv 2303.09556, section 3.4) of samples at these timesteps, (N,) float32.

    The weight of the denoised image's squared error is `min(SNR, gamma)`. An error of epsilon counts
    `1 / SNR` of that, an error of the velocity `1 / (SNR + 1)`.
    """
    signal = noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = signal / (1 - signal)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr < gamma, 1.0, gamma / snr)  # also where the last timestep has no signal at all


@contextlib.contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models as at inference: no noise, no dropout, no gradients; afterwards in the mode they were in."""
    modes = [(model, model.training) for model in models]
    for model, _ in modes:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in modes:
            model.train(training)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in the UNet or in a text encoder."""
    if isinstance(model, UNet2DConditionModel):
        model.enable_gradient_checkpointing()
    elif hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # before transformers renamed it
        model.gradient_checkpointing_enable({"use_reentrant": False})


def add_lora(
    models: dict[str, nn.Module],
    *,
    rank: int,
    alpha: float,
    seed: int,
    unet_targets: Sequence[str] = UNET_TARGETS,
    init_lora_weights: str | bool = "gaussian",
    **settings: Any,
) -> None:
    """Add a LoRA adapter with float32 parameters to the UNet and, where given, the text encoders.

    Args:
        models: `unet`, and `text_encoder` and `text_encoder_2` where they are trained.
        rank: Rank of every layer.
        alpha: The update is scaled by alpha / rank.
        seed: Decides the initial A (B is zero); the global RNG is left as it was.
        unet_targets: Ends of the names of the UNet's layers to adapt.
        init_lora_weights: How PEFT draws A: `gaussian`, or True for its default.
        settings: Further settings of PEFT's `LoraConfig`, such as `use_dora`.

    Raises:
        UserError: A name fits no layer.
    """
    for name, model in models.items():
        targets = unet_targets if name == "unet" else TEXT_ENCODER_TARGETS
        _check_targets(model, targets)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights=init_lora_weights,
            target_modules=list(targets),
            **settings,
        )
        # PEFT draws from the global RNG. The model is on the CPU: adapters start the same on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash64(seed, "lora", name))
            model.add_adapter(config, adapter_name=ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    adaptable = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in adaptable):
            known = sorted({name.rsplit(".", 1)[-1] for name in adaptable} - set("0123456789"))
            raise UserError(
                f"--lora_layers {target}: no linear or convolutional layer of the UNet is called so; "
                f"there are {', '.join(known)}"
            )
