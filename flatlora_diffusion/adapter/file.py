"""Adapters as files: the diffusers format with its metadata, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flatlora_diffusion.common.command import is_unicode
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.sdxl.lora import ADAPTER, FROZEN_ADAPTER, adaptable

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
LIVE_NAME = "pytorch_lora_weights_live.safetensors"  # not averaged, beside an average under the first name
PEFT_NAME = "adapter_model.safetensors"  # what PEFT's own `save_pretrained` writes
FLAT_METADATA_KEY = "flat_lora"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def adapter_tensors(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The adapters of `unet`, `text_encoder`, `text_encoder_2` under the names of the diffusers format.

    A frozen adapter beside the trained one makes both one of twice the rank: its A comes below the trained A,
    its B to the right of the trained B.
    """
    tensors = {}
    for part, model in models.items():
        own = _state(model, ADAPTER)
        if FROZEN_ADAPTER in adaptable(model).peft_config:
            frozen = _state(model, FROZEN_ADAPTER)
            own = {key: torch.cat([own[key], frozen[key]], dim=_rank_dim(key)) for key in own}
        renamed = convert_state_dict_to_diffusers(own)
        # It renames attention layers alone; a reader that meets both kinds of names passes over one of them.
        if not any(".lora_A." in key for key in renamed):
            own = renamed
        for key, tensor in own.items():
            # Newer transformers dropped this level from CLIPTextModel; every reader knows the longer name.
            if part != "unet" and not key.startswith("text_model."):
                key = f"text_model.{key}"
            tensors[loadable_name(f"{part}.{key}")] = tensor.detach().cpu().contiguous()
    return tensors


def loadable_name(key: str) -> str:
    """The key of a DoRA's magnitudes as transformers needs it: it passes over the name that PEFT gives them.

    Diffusers has transformers load the text encoders' adapters, and PEFT the UNet's.
    """
    return f"{key}.weight" if key.startswith("text_") and key.endswith(".lora_magnitude_vector") else key


def load_adapter_tensors(models: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Put what `adapter_tensors` gave back into models with the same adapters, bit for bit.

    Raises:
        UserError: The tensors aren't exactly those of the adapters.
    """
    tensors = {loadable_name(name): tensor for name, tensor in tensors.items()}
    expected = {name: tensor.shape for name, tensor in adapter_tensors(models).items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError("the adapter has other layers or another rank than this run's")
    for part, model in models.items():
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        if part == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(own)
            if not hasattr(model, "text_model"):
                own = {key.removeprefix("text_model."): tensor for key, tensor in own.items()}
        states = {ADAPTER: own}
        if FROZEN_ADAPTER in adaptable(model).peft_config:
            halves = {key: tensor.chunk(2, dim=_rank_dim(key)) for key, tensor in own.items()}
            states = {
                adapter: {key: pair[index] for key, pair in halves.items()}
                for index, adapter in enumerate((ADAPTER, FROZEN_ADAPTER))
            }
        for adapter, state in states.items():
            unknown = set_peft_model_state_dict(model, state, adapter_name=adapter).unexpected_keys
            assert not unknown, f"PEFT passed over {unknown}"


def _state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _rank_dim(key: str) -> int:
    """Which dimension of a weight of LoRA is the rank."""
    return 0 if ".lora_A." in key else 1


def adapter_bytes(models: dict[str, nn.Module], facts: dict[str, Any]) -> bytes:
    """The adapters as one safetensors file, with what diffusers needs to load them and facts of the run."""
    lora_metadata = {}
    for part, model in models.items():
        config = adaptable(model).peft_config[ADAPTER].to_dict()
        if FROZEN_ADAPTER in adaptable(model).peft_config:  # twice the rank at the same scale
            config["r"] *= 2
            config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
            factor = math.sqrt(2) if config["use_rslora"] else 2
            config["lora_alpha"] *= factor
            config["alpha_pattern"] = {k: alpha * factor for k, alpha in config["alpha_pattern"].items()}
        config["lora_dropout"] = 0.0  # of the training: diffusers would draw with it
        for key, value in config.items():
            lora_metadata[f"{part}.{key}"] = sorted(value) if isinstance(value, set) else value
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(lora_metadata, indent=2, sort_keys=True),
        FLAT_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True),
    }
    return with_sorted_metadata(save(adapter_tensors(models), metadata=metadata))


def with_sorted_metadata(file: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library writes them in a random one."""
    return with_metadata(file, {})


def with_metadata(file: bytes, changes: Mapping[str, str | None]) -> bytes:
    """The same safetensors file with some metadata added, replaced, or (where they are None) taken out.

    All of them are in order. The tensors keep their bits.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    metadata = header.get("__metadata__", {}) | changes
    header["__metadata__"] = {name: text for name, text in sorted(metadata.items()) if text is not None}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def metadata_of(file: bytes) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it is none."""
    try:
        length = int.from_bytes(file[:8], "little")
        return dict(json.loads(file[8 : 8 + length]).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def adapter_file(path: Path) -> Path:
    """The adapter's file where its folder is given: of a run, or of PEFT."""
    if not path.is_dir():
        return path
    of_peft = path / PEFT_NAME
    return of_peft if of_peft.is_file() and not (path / WEIGHTS_NAME).exists() else path / WEIGHTS_NAME


def find_file(path: Path) -> Path:
    """An adapter's safetensors file, also where its folder is given.

    Raises:
        UserError: There is none, or safetensors can't open it.
    """
    file = adapter_file(path)
    if file.suffix != ".safetensors" and file.is_file():
        raise UserError(f"{file}: must be a .safetensors file; a pickled one could run code")
    if file.is_file():
        if not is_unicode(str(file)):
            raise UserError(f"{file}: safetensors opens no path that isn't UTF-8; rename it")
        return file
    if not path.is_dir():
        raise UserError(f"{file}: not a sound safetensors file (no such file)")
    names = sorted(own.name for own in path.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{path}: has only {pickled[0]}; a pickled file could run code, save it as safetensors"
        )
    raise UserError(f"{path}: no {WEIGHTS_NAME} in it; give the file itself, or the folder of a run")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts about the run that an adapter file carries; empty for other people's files.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(FLAT_METADATA_KEY, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: not a sound safetensors file ({error})") from error
