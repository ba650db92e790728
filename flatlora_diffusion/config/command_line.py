"""Command line and configuration file -> `TrainConfig`; errors -> one line and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

from flatlora_diffusion.common.command import OneLineParser, invoked_as, nearest
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig

logger = logging.getLogger(__name__)


# Flags of the diffusers script that mean nothing here, and why.
WITHOUT_EFFECT = {
    "dataloader_num_workers": "the images are encoded once before training, so no step waits for them",
    "cache_latents": "the latents of the images are always cached",  # of the advanced script
    "local_rank": "the launcher tells each process its rank",
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention is used, which is as lean",
}
# Settings that the diffusers script doesn't have. Its own flags may be abbreviated as there, these may not.
ADDITIONS = frozenset(
    (
        *("flat_sigma", "flat_schedule", "flat_noise", "compare"),
        *("quantize_base", "lora_weights", "lora_alpha", "use_rslora", "lora_layers", "init_lora_weights"),
        *("scale_weight_norms", "use_ema", "ema_decay", "kohya_folders", "background", "aspect_buckets"),
        *(
            "alpha_background_weight",
            "alpha_mask",
            "caption_chunks",
            "caption_dropout_rate",
            "shuffle_caption",
            "keep_tokens",
            "noise_offset",
            "ip_noise_gamma",
            "loraplus_lr_ratio",
        ),
        *(
            "heldout_data_dir",
            "heldout_split",
            "heldout_steps",
            "stop_when_worse",
            "folds",
            "text_encoder_2_lr",
        ),
        *("train_text_encoder_frac", "train_text_encoder_ti", "train_text_encoder_ti_frac"),
        *("token_abstraction", "num_new_tokens_per_abstraction", "cache_latents", "class_resolution"),
        *("validation_inference_steps", "validation_guidance_scale", "validation_sampler"),
        *("validation_resolution", "final_inference_steps", "cache", "deterministic"),
    )
)
# Flags of the diffusers script that are refused: why, and what to do.
REFUSED = {
    "do_edm_style_training": "is for Playground v2.5, which learns pictures at EDM's noise levels; the loss, "
    "measures and samplers here are made for SDXL's timesteps, and what Flat-LoRA's noise does at others "
    "isn't measured: train such a base with the diffusers script; for SDXL it isn't needed; leave it out",
}


PRESETS = ("icons",)


@dataclass(frozen=True)
class Command:
    """What a command line of the trainer asks for.

    Attributes:
        given: Settings by name, of the file and of flags; flags override the file.
        preset: What chooses the others; see `train.preset`.
        dry_run: To print the plan, not to train.
    """

    given: dict[str, Any]
    preset: str | None
    dry_run: bool


def parse_train_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration from `--config FILE.yaml` and flags; flags override the file.

    Raises:
        UserError: An unknown flag or key, a missing or ill-typed value, an unreadable file.
    """
    return TrainConfig(**parse_command(arguments).given)


def parse_command(arguments: Sequence[str] | None = None) -> Command:
    """All of a command line; the settings that it leaves out are still to be chosen.

    Raises:
        UserError: As `parse_train_config`, but for values that are out of range.
    """
    parser = OneLineParser(
        prog=invoked_as("train_dreambooth_flat.py"),
        description="DreamBooth LoRA training of SDXL with Flat-LoRA: noise on the merged weights makes "
        "the adapter generalise better. Flags are those of diffusers' train_dreambooth_lora_sdxl.py.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings by name; flags override them.")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="Choose resolution, batch, steps, learning rate, EMA, checkpointing and precision by the "
        "pictures and the memory at hand, say why, and write all to preset.yaml in the output folder. What "
        "a flag or --config says stays.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print the plan, with the memory and time that a few steps took, and write nothing.",
    )
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(*flags_of(field), **_argument(field))
    for name in (*WITHOUT_EFFECT, *REFUSED):
        parser.add_argument(
            f"--{name}", nargs="?", const=True, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    given = vars(parser.parse_all(unabbreviated(sys.argv[1:] if arguments is None else arguments)))
    for name, reason in REFUSED.items():
        if name in given:
            raise UserError(f"--{name}: {reason}")
    for name, reason in WITHOUT_EFFECT.items():
        if given.pop(name, None) is not None:
            logger.info("--%s has no effect here: %s", name, reason)
    config_file, preset, dry_run = given.pop("config"), given.pop("preset"), given.pop("dry_run")
    values = {**(read_config_file(Path(config_file)) if config_file else {}), **given}
    values = {
        name: tuple(cast("list[str]", value)) if isinstance(value, list) else value
        for name, value in values.items()
    }
    missing = [f.name for f in dataclasses.fields(TrainConfig) if _is_required(f) and f.name not in values]
    if missing:
        raise UserError(f"missing: {', '.join('--' + name for name in missing)}")
    return Command(values, preset, dry_run)


def unabbreviated(words: Sequence[str]) -> list[str]:
    """A command line with the flags of the diffusers script in full where it has their beginnings.

    As there a beginning must be that of one flag; what else the trainer has besides doesn't count.
    """
    fields = dataclasses.fields(TrainConfig)
    others = {name: [f"--{name}"] for name in (*WITHOUT_EFFECT, *REFUSED)}
    flags = {field.name: flags_of(field) for field in fields} | others
    own = {flag for named in flags.values() for flag in named}
    script = {flag for name, named in flags.items() if name not in ADDITIONS for flag in named}
    whole: list[str] = []
    for word in words:
        flag, separator, value = word.partition("=")
        meant = [name for name in script if name.startswith(flag)] if flag.startswith("--") else []
        is_abbreviation = len(flag) > 2 and flag not in own and len(meant) == 1
        whole.append(f"{meant[0]}{separator}{value}" if is_abbreviation else word)
    return whole


def flags_of(field: dataclasses.Field[Any]) -> list[str]:
    """How a setting is given on the command line; one of them is enough."""
    if field.metadata["only_off"]:  # --cache is short for --cache_dir in the diffusers script
        return [f"--no-{field.name}", f"--no_{field.name}"]
    return [f"--{field.name}"]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _argument(field: dataclasses.Field[Any]) -> dict[str, Any]:
    kind, _ = field_kind(field)
    default = "required" if _is_required(field) else f"default: {field.default}"
    settings: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": f"{field.metadata['help']} ({default})".replace("%", "%%"),
    }
    if field.metadata["only_off"]:
        return settings | {"action": "store_false", "dest": field.name}
    if kind is bool:
        return settings | {"action": _Switch}
    if kind is tuple:
        return settings | {"nargs": "+", "metavar": "TEXT"}
    return settings | {"type": kind, "metavar": _metavar(field, kind)}


class _Switch(argparse.BooleanOptionalAction):
    """A flag that is switched on by itself, off with `--no-`, and either way by a word after it.

    The diffusers script has switches that take a word (`--prodigy_decouple False`, which it reads as true).
    """

    WORDS: ClassVar[dict[str, bool]] = {
        **dict.fromkeys(("true", "yes", "1", "on"), True),
        **dict.fromkeys(("false", "no", "0", "off"), False),
    }

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.nargs = "?"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store true or false."""
        assert option_string is not None, "a flag always has one"
        word = "true" if values is None else values.lower()
        if word not in self.WORDS or (values is not None and option_string.startswith("--no-")):
            parser.error(f"{option_string} {values}: the word after it must be true or false")
        setattr(namespace, self.dest, self.WORDS[word] != option_string.startswith("--no-"))


def _metavar(field: dataclasses.Field[Any], kind: type) -> str:
    choices = field.metadata["choices"]
    return "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file by name.

    Raises:
        UserError: It cannot be read, or has an unknown setting or an ill-typed value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {str(error.strerror).lower()}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold lines of the form `name: value`")
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    settings = cast("dict[str, Any]", content)
    for name in settings:
        if name not in fields:
            raise UserError(f"--config {path}: unknown setting {name}{nearest(str(name), fields)}")
    return {name: _typed(path, fields[name], value) for name, value in settings.items()}


def _typed(path: Path, field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of a configuration file as its field's type."""
    kind, optional = field_kind(field)
    if value is None and optional:
        return None
    if kind is tuple and isinstance(value, (str, list)):
        return [value] if isinstance(value, str) else [str(item) for item in cast("list[object]", value)]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "text or a list",
    }
    raise UserError(f"--config {path}: {field.name} must be {names[kind]}, not {value!r}")


def field_kind(field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """Type of a field without its `| None`, `tuple` for several strings, and whether None is allowed."""
    hint = _hints()[field.name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.get_origin(hint) or hint, optional


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)
