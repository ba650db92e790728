"""PEFT's configurations in the metadata of an adapter file: the rank, the alpha and the scale of a layer."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from torch import Tensor

from flatlora_diffusion.adapter.kohya_names import Layer
from flatlora_diffusion.common.errors import UserError

# PEFT's starts that leave the base's weights alone; the others would subtract from them once more on loading.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# PEFT's settings by which loading would change more of a model than its LoRA layers.
_BEYOND_LORA = ("layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices")


def part_config(lora_metadata: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
    """PEFT's configuration of one part, from the metadata of all; None where they say nothing of it."""
    own = {k.partition(".")[2]: v for k, v in (lora_metadata or {}).items() if k.startswith(f"{part}.")}
    return own or None


def rank_and_alpha(config: dict[str, Any] | None, path: str, rank: int) -> tuple[int, float]:
    """A layer's rank, and the alpha for which its scale is alpha / rank.

    Args:
        config: From `part_config`.
        path: Of the layer in the model.
        rank: Of its tensors, for files without a configuration: alpha is then the rank.

    Raises:
        UserError: The configuration isn't one of PEFT's.
    """
    if config is None:
        return rank, rank
    names = (path, path.removeprefix("text_model."))  # with older and newer transformers

    def setting(default: Any, patterns: dict[str, Any] | None) -> Any:
        known = patterns or {}
        for pattern in known:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):  # as PEFT does
                return known[pattern]
        return default

    try:
        rank = int(setting(config.get("r", 8), config.get("rank_pattern")))  # 8: PEFT's defaults
        alpha = float(setting(config.get("lora_alpha", 8), config.get("alpha_pattern")))
        # rsLoRA scales by alpha / sqrt(rank).
        return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"the adapter's metadata aren't PEFT's ({error}); export it again") from error


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


def fits(config: dict[str, Any], scales: dict[str, tuple[int, float]], dora: bool) -> bool:
    """Whether a configuration gives every layer this rank and alpha."""
    expected = {path: rank_and_alpha(config, path, rank) for path, (rank, _) in scales.items()}
    return bool(config.get("use_dora")) == dora and all(
        rank == expected[path][0] and math.isclose(alpha, expected[path][1], rel_tol=1e-6)
        for path, (rank, alpha) in scales.items()
    )


def config_of(scales: dict[str, tuple[int, float]], dora: bool) -> dict[str, Any]:
    """PEFT's configuration for layers with these ranks and alphas."""
    # Without this level the names fit the models of older and newer transformers.
    scales = {path.removeprefix("text_model."): scale for path, scale in sorted(scales.items())}
    ranks = {path: rank for path, (rank, _) in scales.items()}
    alphas = {path: int(alpha) if alpha == int(alpha) else alpha for path, (_, alpha) in scales.items()}
    rank, alpha = (statistics.mode(sorted(values.values())) for values in (ranks, alphas))
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(scales), "use_dora": dora}
    config["rank_pattern"] = {path: own for path, own in ranks.items() if own != rank}
    config["alpha_pattern"] = {path: own for path, own in alphas.items() if own != alpha}
    return config
