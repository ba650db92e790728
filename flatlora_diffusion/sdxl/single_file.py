"""SDXL bases in one file with the names of the original repository, as Civitai and ComfyUI have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.models import load_whole
from flatlora_diffusion.sdxl.shapes import REFINER

SUFFIX = ".safetensors"
CONFIGURATIONS = Path(__file__).with_name("configurations")
"""A pipeline of SDXL without its weights."""

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_ONE, _TWO = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_PREFIXES = {"unet": (_UNET,), "vae": (_VAE, "vae."), "text_encoder": (_ONE,), "text_encoder_2": (_TWO,)}
_END = "<|endoftext|>"
_PADDING = {"tokenizer": _END, "tokenizer_2": "!"}  # as SDXL's own tokenizers have it
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")  # empty tensors that say how a base was trained
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"


class SingleFile:
    """A base in one file; opened and looked at, but not loaded.

    Its configurations are SDXL's. Those of another architecture are in a folder beside the file, called like
    it without its suffix: a pipeline in the diffusers format, of which no weights are needed.

    Args:
        flag: How the user named it, for errors.
        path: The file.
        own_vae: A VAE is given apart, so that the file needn't have one.

    Attributes:
        configurations: The folder that they are in.

    Raises:
        UserError: It is damaged, or something else than an SDXL base.
    """

    def __init__(self, flag: str, path: Path, *, own_vae: bool = False) -> None:
        self._flag, self._path = flag, path
        self._shapes, metadata = _header(flag, path)
        beside = path.with_suffix("")
        self.configurations = beside if (beside / "model_index.json").is_file() else CONFIGURATIONS
        if any(key in self._shapes for key in _EDM):
            raise UserError(f"{flag}: an EDM base (Playground v2.5, CosXL); give an SDXL base")
        self._require_parts(own_vae)
        # What finetuners' tools say of it: empty tensors, and sd-scripts in the header.
        self._velocity = _V_PREDICTION in self._shapes or metadata.get("modelspec.prediction_type") == "v"
        self._zero_snr = _ZERO_SNR in self._shapes

    @property
    def unet_channels(self) -> dict[str, int]:
        """What the UNet takes and gives, as its configuration calls them."""
        first, last = (self._shapes[f"{_UNET}{key}"] for key in ("input_blocks.0.0.weight", "out.2.weight"))
        return {"in_channels": first[1], "out_channels": last[0]}

    def part(self, kind: Any, folder: str, **settings: Any) -> Any:
        """A part of the pipeline, as `kind.from_pretrained(..., subfolder=folder)` gives it.

        Args:
            kind: Its class.
            folder: Its name in a pipeline.
            settings: `dtype`, for weights; others have no meaning here.

        Raises:
            UserError: Weights are missing or have other shapes than its configuration says.
        """
        flag = f"{self._flag}: {folder}"
        if folder in _PREFIXES:
            tensors = self._tensors(_PREFIXES[folder])
            return load_model(flag, kind, self.configurations, folder, tensors, settings["dtype"])
        if folder in _PADDING and self.configurations == CONFIGURATIONS:
            return clip_tokenizer(_PADDING[folder])
        home = str(self.configurations)
        if folder != "scheduler":
            return load_whole(flag, kind.from_pretrained, home, subfolder=folder)
        config = load_whole(flag, kind.load_config, home, subfolder=folder)
        if self._velocity:
            config = {**config, "prediction_type": "v_prediction"}
        if self._zero_snr:
            # Its last timestep is pure noise: drawing has to begin there (arXiv 2305.08891).
            config = {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return kind.from_config(config)

    def _require_parts(self, own_vae: bool) -> None:
        keys = self._shapes

        def has(prefix: str) -> bool:
            return any(key.startswith(prefix) for key in keys)

        met = None
        if any("lora_" in key or ".lora" in key for key in keys):
            met = "a LoRA, not a base; give the SDXL base that it is for"
        elif has("cond_stage_model."):
            met = "a base of SD 1.5 or 2; give an SDXL base"
        elif has("conditioner.embedders.0.model."):
            met = REFINER
        elif not has(_UNET):
            first = next(iter(keys), "nothing")
            met = f"no SDXL base (it has {first}); give a checkpoint with UNet and text encoders"
        elif f"{_UNET}label_emb.0.0.weight" not in keys:
            met = "its UNet takes no text and time embedding, so it isn't SDXL's"
        elif not (has(_ONE) and has(_TWO)):
            met = "has no text encoders; give a checkpoint with both"
        elif not own_vae and not any(map(has, _PREFIXES["vae"])):
            met = "has no VAE; give one with --pretrained_vae_model_name_or_path"
        if met:
            raise UserError(f"{self._flag}: {met}")

    def _tensors(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        with safe_open(self._path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in self._shapes if key.startswith(prefixes)}


def is_single_file(name: str) -> bool:
    """Whether a base or a VAE is given as one file of safetensors."""
    return name.endswith(SUFFIX) and Path(name).is_file()


def load_single_vae(flag: str, path: Path, kind: Any) -> Any:
    """A VAE of its own file, or that of a base's, in float32 with SDXL's configuration.

    Raises:
        UserError: It isn't one.
    """
    shapes, _ = _header(flag, path)
    prefixes = _PREFIXES["vae"] if any(key.startswith(_PREFIXES["vae"]) for key in shapes) else ("",)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in shapes if key.startswith(prefixes)}
    beside = path.with_suffix("")
    home = beside if (beside / "vae").is_dir() else CONFIGURATIONS
    return load_model(flag, kind, home, "vae", tensors, torch.float32)


def load_model(
    flag: str, kind: Any, home: Path, folder: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Any:
    """A model of diffusers or transformers, of weights in the original repository's names, in `eval()`.

    Args:
        flag: Names it in errors.
        kind: Its class.
        home: The pipeline's folder, for the configuration.
        folder: Its name in a pipeline.
        tensors: In the names of the file.
        dtype: Precision.

    Raises:
        UserError: Weights are missing or have other shapes than the configuration says.
    """
    if folder in ("unet", "vae"):
        config = load_whole(flag, kind.load_config, str(home), subfolder=folder)
        make: Callable[[Any], Any] = kind.from_config
    else:
        config = load_whole(flag, CLIPTextConfig.from_pretrained, str(home), subfolder=folder)
        make = kind
    with init_empty_weights():
        model = make(config)
    try:
        converted = _CONVERT[folder](model, tensors, config)
        # Newer transformers dropped this level from CLIPTextModel.
        level = "" if hasattr(model, "text_model") else "text_model."
        known = {key.removeprefix(level): _copy(tensor, dtype) for key, tensor in converted.items()}
        report = model.load_state_dict(known, strict=False, assign=True)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{flag}: doesn't fit the configuration in {home / folder} ({reason[:200]}); put the right ones "
            "into a folder beside the file, called like it without .safetensors"
        ) from error
    if report.missing_keys:
        missing = sorted(report.missing_keys)
        raise UserError(f"{flag}: {len(missing)} weights are missing from its file ({missing[0]}, ...)")
    return model.eval()


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Out of the file's pages, row by row: products of matrices round by how these lie in memory."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _vae(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    if any(key.startswith("encoder.down_blocks.") for key in tensors):  # diffusers' own names
        return dict(tensors)
    return convert_ldm_vae_checkpoint(tensors, config)


def _open_clip(model: Any, tensors: Mapping[str, Tensor], _: Any) -> dict[str, Tensor]:
    return convert_open_clip_checkpoint(model, tensors, prefix=_TWO)


_CONVERT: dict[str, Callable[[Any, Mapping[str, Tensor], Any], dict[str, Tensor]]] = {
    "unet": lambda _, tensors, config: convert_ldm_unet_checkpoint(tensors, config),
    "vae": lambda _, tensors, config: _vae(tensors, config),
    "text_encoder": lambda *given: convert_ldm_clip_checkpoint(given[1]),
    "text_encoder_2": _open_clip,
}


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer, of its merges: the vocabulary is all bytes, those at a word's end, what is merged.

    Args:
        padding: The token that fills up prompts.
    """
    lines = (CONFIGURATIONS / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines]  # its declared type knows files and lines
    # Bytes stand for themselves where they are printable, and else for signs from 256 on (GPT-2's BPE).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    signs = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=padding)


def _header(flag: str, path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of a file's tensors by their names, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_slice(name).get_shape() for name in names}, file.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{flag}: not a sound safetensors file ({error})") from error
