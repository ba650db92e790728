"""An adapter file, checked before anything of it enters a pipeline, and compared with what entered."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_file, loadable_name, read_facts
from flatlora_diffusion.adapter.formats import read_adapter
from flatlora_diffusion.adapter.kohya import (
    complete_layers,
    part_config,
    rank_and_alpha,
    shaped,
    to_diffusers,
)
from flatlora_diffusion.adapter.kohya_names import (
    CONVOLUTION,
    PREFIXES,
    Layer,
    layer_names,
    parse_kohya_key,
    split_diffusers_key,
)
from flatlora_diffusion.adapter.mix import Mix, Source, mix_digest
from flatlora_diffusion.adapter.strength import without_strength
from flatlora_diffusion.common.command import is_unicode
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.weights import weight_of

_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# How many features of a prompt the UNet's cross-attention takes.
_PROMPT_FEATURES = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}
# PEFT's starts that leave the base's weights alone; the others would subtract from them once more on loading.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# PEFT's settings by which loading would change more of a model than its LoRA layers.
_BEYOND_LORA = ("layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter file is.

    Attributes:
        file: The file itself, also where its folder was given.
        sha256: Of the file, in hex.
        method: `LoRA` or `Flat-LoRA`; None for other people's files, which don't say.
        rank: Of its layers: `4`, or from the lowest to the highest: `4-8`.
        alpha: In the same way; None where the file states none, and the update is B @ A.
        layers: Number of adapted layers.
        parameters: Number of values in all.
        parts: Those of `unet`, `text_encoder` and `text_encoder_2` that have adapted layers.
        dora: Whether any layer has DoRA's magnitudes.
        facts: What this project wrote into it (`file.read_facts`).
        mix: Of several adapters at once: what each is, and its scale. Rank, alpha and layers are of all.
    """

    file: Path
    sha256: str
    method: str | None
    rank: str
    alpha: str | None
    layers: int
    parameters: int
    parts: tuple[str, ...]
    dora: bool
    facts: dict[str, Any]
    mix: tuple[tuple[AdapterFacts, float], ...] = ()

    @property
    def source(self) -> Source:
        """What it was loaded from."""
        return Mix(tuple((part.file, scale) for part, scale in self.mix)) if self.mix else self.file

    @property
    def mixed(self) -> list[list[str | float]] | None:
        """Of several at once the SHA-256 and the scale of each, as stamps have them."""
        return [[part.sha256, scale] for part, scale in self.mix] or None


def facts_of_mix(parts: Sequence[tuple[AdapterFacts, float]]) -> AdapterFacts:
    """What several adapters at once are.

    Args:
        parts: Each with its scale.
    """
    all_facts = [facts for facts, _ in parts]
    told = [facts.alpha for facts in all_facts]
    return AdapterFacts(
        file=all_facts[0].file,
        sha256=mix_digest((facts.sha256, scale) for facts, scale in parts),
        method=None,
        rank=" + ".join(facts.rank for facts in all_facts),
        alpha=None if None in told else " + ".join(filter(None, told)),
        layers=sum(facts.layers for facts in all_facts),
        parameters=sum(facts.parameters for facts in all_facts),
        parts=tuple(dict.fromkeys(part for facts in all_facts for part in facts.parts)),
        dora=any(facts.dora for facts in all_facts),
        facts={},
        mix=tuple(parts),
    )


@dataclass(frozen=True)
class _Content:
    """The layers of a file: their tensors (down, up, magnitude, alpha), scale of the update, stated alpha.

    The tensors have PEFT's shapes. `as_diffusers`: diffusers reads the file itself.
    """

    layers: dict[Layer, dict[str, Tensor]]
    scales: dict[Layer, float]
    alphas: dict[Layer, float]
    as_diffusers: bool


def check_adapter(pipeline: StableDiffusionXLPipeline, path: Path) -> AdapterFacts:
    """Refuse an adapter that isn't sound or doesn't fit a base. The pipeline is left as it is.

    Args:
        pipeline: The base, with or without other adapters.
        path: A safetensors file in the diffusers format, kohya's or PEFT's, or its folder.

    Returns:
        What the file is.

    Raises:
        UserError: Names the file, the tensor or layer that is wrong, and what to do.
    """
    file = find_file(path)
    facts = read_facts(file)  # a missing or damaged file is named
    if not isinstance(facts, dict):
        raise UserError(f"{file}: its facts of the training aren't a JSON object; export it again")
    content = _read(pipeline, file)
    _check_fit(pipeline, file, content)
    sizes = [tensor.numel() for own in content.layers.values() for k, tensor in own.items() if k != "alpha"]
    method = facts.get("method")
    return AdapterFacts(
        file=file,
        sha256=file_digest(file),
        method=method if isinstance(method, str) else None,
        rank=_range([len(weights["down"]) for weights in content.layers.values()]),
        alpha=_range(list(content.alphas.values())) if content.alphas else None,
        layers=len(content.layers),
        parameters=sum(sizes),
        parts=tuple(part for part in PREFIXES if any(part == own for own, _ in content.layers)),
        dora=any("magnitude" in weights for weights in content.layers.values()),
        facts=facts,
    )


def converted(
    pipeline: StableDiffusionXLPipeline, adapter: AdapterFacts
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The adapter in the diffusers format and PEFT's configurations; None where the file itself is in it.

    Of kohya's files diffusers leaves out DoRA and takes the most frequent alpha for all layers, and of others
    the DoRA of text encoders, so it is handed what they mean.

    Args:
        pipeline: The base that the adapter was checked against.
        adapter: From `check_adapter`.
    """
    content = _read(pipeline, adapter.file)
    if content.as_diffusers:
        return None
    return to_diffusers(
        {
            layer: weights | {"alpha": torch.tensor(content.scales[layer] * len(weights["down"]))}
            for layer, weights in content.layers.items()
        }
    )


def check_loaded(pipeline: StableDiffusionXLPipeline, name: str, adapter: AdapterFacts) -> None:
    """Refuse an adapter of which diffusers has loaded something else than the file says.

    It is compared after loading, since no look at the file tells: diffusers passes over keys in mixed
    spellings, and PEFT over layers that its metadata don't name.

    Args:
        pipeline: With the adapter loaded.
        name: Under which it is loaded.
        adapter: From `check_adapter`.

    Raises:
        UserError: Names a layer whose tensors or scale didn't arrive, or that the file doesn't have.
    """
    if file_digest(adapter.file) != adapter.sha256:
        raise UserError(f"{adapter.file}: was replaced while it was read; load it again")
    content = _read(pipeline, adapter.file)
    modules = _modules(pipeline)
    loaded = {
        layer: module
        for layer, module in modules.items()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }
    for layer in sorted(loaded.keys() | content.layers.keys()):
        weights = content.layers.get(layer, {})
        if layer in loaded and _arrived(loaded[layer], name, weights, content.scales.get(layer, math.nan)):
            continue
        raise UserError(
            f"{adapter.file}: {'.'.join(layer)}: diffusers doesn't load what the file has for it; export it "
            "again"
        )


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


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hex; without the scale that an evaluation may have noted in it since."""
    return hashlib.sha256(without_strength(file.read_bytes())).hexdigest()


def _read(pipeline: StableDiffusionXLPipeline, file: Path) -> _Content:
    """The layers of a file, sound in themselves.

    Raises:
        UserError: Names the file and what is wrong in it.
    """
    text_encoders = {part: getattr(pipeline, part) for part in PREFIXES if part != "unet"}
    widths = {part: model.config.hidden_size for part, model in text_encoders.items()}
    adapter = read_adapter(file, widths)
    tensors, configs, of_kohya = adapter.tensors, adapter.configs, adapter.format == "kohya"
    require_finite(file, tensors)
    parse = split_diffusers_key
    if of_kohya:
        parse = functools.partial(parse_kohya_key, layer_names(pipeline.unet.config.layers_per_block))
    try:
        found = complete_layers(tensors, parse)
        modules = _modules(pipeline)
        layers = {
            layer: shaped(weights, layer, _is_convolution(modules, layer), of_kohya=of_kohya)
            for layer, weights in found.items()
        }
        for part in PREFIXES:
            check_config(part, part_config(configs, part))
        scales, alphas = {}, {}
        for layer, weights in layers.items():
            config = part_config(configs, layer[0])
            scales[layer], alpha = scale_and_alpha(layer, weights, config)
            if alpha is not None:
                alphas[layer] = alpha
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    same = all(loadable_name(key) == key for key in tensors) and all(
        weights[kind].shape == found[layer][kind].shape
        for layer, weights in layers.items()
        for kind in weights
    )
    return _Content(layers, scales, alphas, adapter.format == "diffusers" and same)


def _is_convolution(modules: dict[Layer, nn.Module], layer: Layer) -> bool:
    """Whether a layer is one in the base; by its name where the base lacks it."""
    module = modules.get(layer)
    if module is None:
        return CONVOLUTION.fullmatch(layer[1]) is not None
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Conv2d)


def require_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors of a file with values that aren't finite numbers.

    Raises:
        UserError: Names the file and the first of them.
    """
    for key in sorted(tensors):
        tensor = tensors[key]
        # sd-scripts writes an alpha as a whole number.
        number = tensor.is_floating_point() or (key.endswith(".alpha") and tensor.dtype in _WHOLE)
        if not (number and tensor.float().isfinite().all()):
            raise UserError(f"{file}: {key} has values that aren't finite numbers; get a sound file")


def check_config(part: str, config: dict[str, Any] | None) -> None:
    """Refuse a configuration of PEFT with which loading would change the base."""
    if config is None:
        return
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UserError(
            f"{part}.init_lora_weights {start!r} in its metadata changes the base on loading; save it as an "
            "ordinary LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    for setting in _BEYOND_LORA:
        if config.get(setting):
            raise UserError(f"{part}.{setting} in its metadata: more than a LoRA; export the LoRA alone")


def scale_and_alpha(
    layer: Layer, weights: dict[str, Tensor], config: dict[str, Any] | None
) -> tuple[float, float | None]:
    """The factor on B @ A, and the alpha that the file states, if it does."""
    name, rank = ".".join(layer), len(weights["down"])
    if not rank:
        raise UserError(f"{name}: rank 0, so it has no weights; export it again")
    alpha = scaled = None
    if "alpha" in weights:
        if weights["alpha"].numel() != 1:
            raise UserError(f"{name}: alpha must be one number; mend the file")
        alpha = scaled = weights["alpha"].item()
    elif config is not None:
        stated, scaled = rank_and_alpha(config, layer[1], rank)
        if stated != rank:
            raise UserError(f"{name}: rank {rank}, in the metadata {stated}; export it again")
        alpha = scaled / math.sqrt(rank) if config.get("use_rslora") else scaled
    if scaled is None:
        return 1.0, None
    # Some readers take 0 for the rank and others for 0: whoever made the file must say.
    if not math.isfinite(scaled) or not scaled:
        raise UserError(f"{name}: alpha {scaled:g} must be a finite number other than 0; mend the file")
    return scaled / rank, alpha


def _modules(pipeline: StableDiffusionXLPipeline) -> dict[Layer, nn.Module]:
    """The layers of a pipeline that a LoRA can be on, or is on."""
    found = {}
    for part in PREFIXES:
        for path, module in getattr(pipeline, part).named_modules():
            if isinstance(module, LoraLayer):
                kind = module.get_base_layer()
            elif ".base_layer" in path or ".lora_" in path:
                continue
            else:
                kind = module
            if isinstance(kind, (nn.Linear, nn.Conv2d)):
                # Newer transformers dropped this level from CLIPTextModel.
                shortened = part != "unet" and not path.startswith("text_")
                found[part, f"text_model.{path}" if shortened else path] = module
    return found


def _check_fit(pipeline: StableDiffusionXLPipeline, file: Path, content: _Content) -> None:
    """Refuse layers that the base doesn't have, or has in another shape."""
    modules = _modules(pipeline)

    def refuse(reason: str) -> None:
        origin = _origin(pipeline, content)
        raise UserError(
            f"{file}: doesn't fit this base ({reason}{origin}); give an adapter that was trained on this base"
        )

    unknown = sorted(layer for layer in content.layers if layer not in modules)
    if unknown:
        refuse(f"{'.'.join(unknown[0])}, 1 of {len(unknown)} such layers, isn't in it")
    for layer, weights in sorted(content.layers.items()):
        module = modules[layer]
        expected = _shapes(module.get_base_layer() if isinstance(module, LoraLayer) else module, weights)
        for kind, shape in expected.items():
            if kind in weights and weights[kind].shape != shape:
                met = f"{'.'.join(layer)}: its {kind} weight is {list(weights[kind].shape)}"
                refuse(f"{met} and must be {list(shape)}")


def _shapes(base: nn.Module, weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the weights of a layer must have."""
    rank = len(weights["down"])
    shapes: dict[str, tuple[int, ...]]
    magnitude: tuple[int, ...]
    if isinstance(base, nn.Linear):
        shapes = {"down": (rank, base.in_features), "up": (base.out_features, rank)}
        magnitude = (base.out_features,)
    else:
        assert isinstance(base, nn.Conv2d), "_modules finds no other kind"
        shapes = {
            "down": (rank, base.in_channels, *base.kernel_size),
            "up": (base.out_channels, rank, 1, 1),
        }
        magnitude = (1, base.out_channels, 1, 1)
    return shapes | {"magnitude": magnitude}


def _origin(pipeline: StableDiffusionXLPipeline, content: _Content) -> str:
    """What gives an adapter of another model away: how many features of a prompt it takes."""
    takes = {
        weights["down"].shape[1]
        for (part, path), weights in content.layers.items()
        if part == "unet" and path.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    model = _PROMPT_FEATURES.get(min(takes, default=0))
    if len(takes) != 1 or model is None or takes == {pipeline.unet.config.cross_attention_dim}:
        return ""
    return f"; by its {min(takes)} prompt features it is for {model}"


def _arrived(module: LoraLayer, name: str, weights: dict[str, Tensor], scale: float) -> bool:
    """Whether a layer has exactly these weights, in the precision in which it holds them, and this scale."""
    held = {"down": weight_of(module.lora_A[name]), "up": weight_of(module.lora_B[name])}
    if name in module.lora_magnitude_vector:
        held["magnitude"] = weight_of(module.lora_magnitude_vector[name])
    same_scale = math.isclose(module.scaling[name], scale, rel_tol=1e-6)
    if held.keys() != weights.keys() - {"alpha"} or not same_scale:
        return False
    return all(
        own.shape == weights[kind].shape and torch.equal(own.detach(), weights[kind].to(own))
        for kind, own in held.items()
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low}-{high}"
