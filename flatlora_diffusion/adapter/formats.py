"""Which format an adapter file has, judged by its keys: diffusers', kohya's or PEFT's; others are named.

PEFT's own files (`save_pretrained`) hold the adapter of one model. Ranks and alphas are in the file
`adapter_config.json` beside them; which model it is, only the layers tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.common.errors import UserError

PEFT_CONFIG_NAME = "adapter_config.json"
SDXL_WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280}

_PEFT_PREFIX = "base_model.model."
_UNET_PATH = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b.*"
)
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")  # those that take the model's own width
# Keys of formats that aren't read: what they are, and what makes a LoRA of them.
_MERGED = (
    "merge it into its base with LyCORIS's tools/merge.py, then extract a LoRA with sd-scripts' "
    "networks/extract_lora_from_models.py"
)
_ONETRAINER = "convert it with OneTrainer's scripts/convert_model.py to LEGACY_SAFETENSORS"
_FOREIGN = {
    r"bundle_emb\..*": (
        "an embedding bundled by OneTrainer",
        "save the LoRA and its embeddings apart: without them it isn't what was trained",
    ),
    r"(unet|clip_[lg]|lora_te\d?|lora_unet)\..*\.(lora_(down|up)\.weight|alpha|dora_scale)": (
        "of OneTrainer's own format",
        _ONETRAINER,
    ),
    r".*[._]lokr_(w1|w2|t1|t2)(_[ab])?": ("LyCORIS's LoKr", _MERGED),
    r".*[._]hada_(w1|w2|t1|t2)(_[ab])?": ("LyCORIS's LoHa", _MERGED),
    r".*[._](oft_(blocks|diag|R|r|s)|vera_lambda_[bd]|boft_[a-zA-Z]+)(\..*)?": ("OFT, BOFT or VeRA", _MERGED),
    r".*\.on_input": ("LyCORIS's IA3", _MERGED),
    r".*\.[ab][12]\.weight": ("LyCORIS's GLoRA", _MERGED),
    r".*\.(diff|diff_b)": ("a full difference of weights", _MERGED),
    r".*\.[wb]_norm": ("LyCORIS's trained norm", _MERGED),
    r".*[._]lora_mid\.weight": ("LyCORIS's Tucker decomposition of a convolution", _MERGED),
    r".*\.ia3_l": ("PEFT's IA3", "only LoRA and DoRA can be read; merge it into its base"),
}


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter file holds.

    Attributes:
        tensors: By their keys; those of PEFT's own files begin with the part, as in the diffusers format.
        configs: PEFT's configurations, as `unet.lora_alpha`; None where the file has none.
        metadata: Of the file itself.
        format: `diffusers`, `kohya` or `peft`.
    """

    tensors: dict[str, Tensor]
    configs: dict[str, Any] | None
    metadata: dict[str, str]
    format: str


def read_adapter(file: Path, widths: Mapping[str, int] = SDXL_WIDTHS) -> AdapterTensors:
    """All tensors of an adapter file, and PEFT's configurations.

    Args:
        file: A safetensors file.
        widths: Features of `text_encoder` and `text_encoder_2`, which tell whose a file of PEFT is.

    Raises:
        UserError: It is damaged, its configurations are no JSON objects, or its model can't be told.
    """
    tensors = read_tensors(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if any(key.startswith("lora_") for key in tensors):
        return AdapterTensors(tensors, None, metadata, "kohya")
    wrapped = [key for key in tensors if key.startswith(_PEFT_PREFIX)]
    if not wrapped or len(wrapped) < len(tensors):
        try:
            configs = read_configs(metadata.get(LORA_ADAPTER_METADATA_KEY))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        return AdapterTensors(tensors, configs, metadata, "diffusers")
    config = _peft_config(file)
    paths = {key: key.removeprefix(_PEFT_PREFIX) for key in wrapped}
    part = _part_of(file, {paths[key]: tensors[key] for key in wrapped}, widths)
    named = {f"{part}.{path}": tensors[key] for key, path in paths.items()}
    return AdapterTensors(named, {f"{part}.{key}": own for key, own in config.items()}, metadata, "peft")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a sound safetensors file ({error})") from error


def read_configs(text: str | None) -> dict[str, Any] | None:
    """PEFT's configurations, as `unet.lora_alpha`, from the text of a file's metadata.

    Raises:
        UserError: The text is no JSON object.
    """
    try:
        configs = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        configs = text
    if not isinstance(configs, dict | None):
        raise UserError("the adapter's metadata aren't a JSON object; export it again")
    return configs


def describe_unknown(keys: Iterable[str]) -> str:
    """Why keys that are no LoRA weights can't be read, and what to do, by the format that they tell."""
    keys = list(keys)
    for key in keys:
        for pattern, (what, todo) in _FOREIGN.items():
            if re.fullmatch(pattern, key):
                return f"{key}, 1 of {len(keys)} such keys, is {what}, which can't be read; {todo}"
    return (
        f"{keys[0]}, 1 of {len(keys)} such keys, is no LoRA weight of SDXL; only LoRA and DoRA of its layers "
        "can be read"
    )


def _peft_config(file: Path) -> dict[str, Any]:
    path = file.with_name(PEFT_CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); {file.name} is PEFT's, and its rank and alpha are "
            "there: put it beside it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON; get the file that was saved with {file.name}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind!r}; only LoRA and DoRA can be read")
    return config


def _part_of(file: Path, tensors: Mapping[str, Tensor], widths: Mapping[str, int]) -> str:
    """The model that a file of PEFT is for: by its layers, then by the folder's name."""
    if any(_UNET_PATH.fullmatch(path) for path in tensors):
        return "unet"
    takes = {
        tensor.shape[1]
        for path, tensor in tensors.items()
        if path.endswith(tuple(f"{name}.lora_A.weight" for name in _TEXT_LAYERS))
    }
    fitting = [part for part, width in widths.items() if takes == {width}]
    if len(fitting) == 1:
        return fitting[0]
    if file.parent.name in (fitting or widths):
        return file.parent.name
    raise UserError(
        f"{file}: PEFT's format, and its layers don't tell which model it is for; save it in a folder "
        "text_encoder or text_encoder_2"
    )
