"""The model card of a run: what it is, how to use it, how it was made."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.config.settings import FLAT, PLAIN, TrainConfig
from flatlora_diffusion.output.findings import best_steps, scales, steps_of_folds
from flatlora_diffusion.output.gallery import final_drawing
from flatlora_diffusion.output.names import FOLDER, numbered_steps, step_name
from flatlora_diffusion.output.snippet import DTYPES, public_name, snippet
from flatlora_diffusion.sheet.files import MANIFEST, read_manifest

logger = logging.getLogger(__name__)

CARD = "README.md"
USE = "## Use\n"  # the heading under which scales are recommended

_KNOWN_LICENCES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
_SEAL = "<!-- Written by flatlora_diffusion. Once changed, it is not written again. sha256 {} -->\n"
_METHOD = """\
Flat-LoRA adds noise to the merged weights while the adapter trains, scaled to the norm of each filter, so
that the adapter lands in a flat region of the full weight space. The file is an ordinary LoRA.

```bibtex
@inproceedings{li2025flatlora,
  title     = {Flat-{LoRA}: Low-Rank Adaptation over a Flat Loss Landscape},
  author    = {Li, Tao and He, Zhengbao and Li, Yujun and Wang, Yasheng and Shang, Lifeng and Huang, Xiaolin},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.14396}
}
```
"""


@dataclass(frozen=True)
class Example:
    """A picture of the adapter: its file, relative to the card, and what it was drawn from."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Exhibit:
    """What a card shows.

    Attributes:
        sheet: A contact sheet, relative to the card.
        caption: What is on it.
        examples: Single pictures of the adapter.
    """

    sheet: str
    caption: str
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Making:
    """What neither the settings nor the adapter's file tell of a run.

    Attributes:
        images: Number of training images.
        processes: Number of processes that trained.
        precision: Of the base: `no`, `fp16` or `bf16`.
    """

    images: int
    processes: int
    precision: str


def comparison_exhibit(sheet: Path, folder: Path) -> Exhibit:
    """The sheet of a comparison, with the pictures of its last column.

    Args:
        sheet: In the folder of the card.
        folder: Where the single pictures and their manifest are.
    """
    manifest = read_manifest(folder / MANIFEST)
    caption = f"{', '.join(manifest['columns'])}; in each row the same prompt, seed and initial noise."
    examples = [
        Example(f"{folder.name}/{row['images'][-1]}", row["prompt"], row["seed"]) for row in manifest["rows"]
    ]
    return Exhibit(sheet.name, caption, examples)


def seen_from_arm(exhibit: Exhibit) -> Exhibit:
    """What the card of an arm shows of its comparison: the sheet, which is a folder above the card."""
    return Exhibit(f"../{exhibit.sheet}", exhibit.caption)


def validation_exhibit(folder: Path, last_step: int) -> Exhibit | None:
    """The latest sheet of a run's validation, where there is one."""
    steps = [step for step in numbered_steps(folder.glob("step-*.png")) if step <= last_step]
    if not steps:
        return None
    caption = f"Validation pictures after step {steps[-1]} of {last_step}."
    return Exhibit(f"{folder.name}/{step_name(steps[-1])}.png", caption)


def write_card(
    config: TrainConfig,
    adapters: dict[str, Path],
    making: Making,
    exhibit: Exhibit | None = None,
    repository: str | None = None,
) -> None:
    """Write the model card of a run, or of a comparison, into its output folder.

    The same run gives the same card. A README.md that somebody has written or changed stays as it is.

    Args:
        config: Settings of the run.
        adapters: Method -> folder of its adapter, in the output folder. The snippet loads the last one.
        making: What else is told of the run.
        exhibit: The pictures to show; by default those of the last validation.
        repository: Its name on the hub, where it is uploaded.

    Raises:
        UserError: The disk is full or not writable, or an adapter is damaged.
    """
    path = Path(config.output_dir, CARD)
    if path.exists() and not is_ours(path.read_bytes()):
        logger.info("%s was written or changed by somebody else and stays as it is", path)
        return
    facts = {method: read_facts(folder / WEIGHTS_NAME) for method, folder in adapters.items()}
    steps = next(iter(facts.values()))["steps"]
    exhibit = exhibit or validation_exhibit(path.with_name(FOLDER), steps)
    shown = exhibit.examples[0] if exhibit and exhibit.examples else None
    code = snippet(
        config,
        adapters,
        facts,
        precision=making.precision,
        drawing=final_drawing(config),
        picture=(shown.prompt, shown.seed) if shown else None,
        repository=repository,
    )
    parts = [
        f"---\n{_metadata(config, facts, exhibit).to_yaml()}\n---\n",
        f"# SDXL {' and '.join(facts)} DreamBooth - {repository or path.absolute().parent.name}\n",
        *_pictures(exhibit),
        "## Trigger words\n",
        f"You should use {_code(config.instance_prompt)} to trigger the image generation.\n",
        USE,
        *scales(adapters),
        f"```python\n{code}```\n",
        "## Training\n",
        _table(config, facts, making),
        *best_steps(adapters),
        *(steps_of_folds(adapters) if config.folds else []),  # else those there are of a run before
        *([_METHOD] if _is_flat(facts) else []),
        "## License\n",
        _licence_note(config.pretrained_model_name_or_path),
        "",
    ]
    write_atomically(path, sealed("\n".join(parts).encode()))


def is_ours(card: bytes) -> bool:
    """Whether a card was written here and not changed since."""
    return card == sealed(unsealed(card))


def unsealed(card: bytes) -> bytes:
    """What a card says: all but its last line."""
    return card[: card.rstrip(b"\n").rfind(b"\n") + 1]


def sealed(body: bytes) -> bytes:
    """A card that `is_ours`, of what it says."""
    return body + _SEAL.format(hashlib.sha256(body).hexdigest()).encode()


def _metadata(
    config: TrainConfig, facts: dict[str, dict[str, Any]], exhibit: Exhibit | None
) -> ModelCardData:
    """What the hub reads: the tags of diffusers' script, and `flat-lora`."""
    base = config.pretrained_model_name_or_path
    examples = exhibit.examples if exhibit else ()
    licence: dict[str, Any] = _licence(base)
    return ModelCardData(
        base_model=None if Path(base).exists() else base,  # the hub takes names of its own alone
        library_name="diffusers",
        tags=[
            "text-to-image",
            "diffusers-training",
            "diffusers",
            "dora" if config.use_dora else "lora",
            "template:sd-lora",
            "stable-diffusion-xl",
            "stable-diffusion-xl-diffusers",
            *(["flat-lora"] if _is_flat(facts) else []),
        ],
        instance_prompt=config.instance_prompt,
        widget=[{"text": example.prompt, "output": {"url": example.file}} for example in examples] or None,
        **licence,
    )


def _is_flat(facts: dict[str, dict[str, Any]]) -> bool:
    return any(known["method"] == FLAT for known in facts.values())


def _pictures(exhibit: Exhibit | None) -> list[str]:
    if exhibit is None:
        return []
    gallery = ["<Gallery />\n"] if exhibit.examples else []
    return [*gallery, f"![{exhibit.caption}]({exhibit.sheet})\n", f"*{exhibit.caption}*\n"]


def _table(config: TrainConfig, facts: dict[str, dict[str, Any]], making: Making) -> str:
    """The settings that somebody would ask for."""
    known = list(facts.values())[-1]
    methods = [
        f"{FLAT}, sigma {each['flat_sigma']:g} ({each['flat_schedule']}, {each['flat_noise']})"
        if each["method"] == FLAT
        else PLAIN
        for each in facts.values()
    ]
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets, rates = " ".join(known["targets"]["unet"]), f"{config.learning_rate:g}"
    if config.train_text_encoder:
        targets += ", both text encoders"
        rates += f" (text encoders {config.text_encoder_lr:g}, {config.second_text_encoder_lr:g})"
    prior = config.with_prior_preservation
    rows = {
        "base": _code(public_name(config.pretrained_model_name_or_path)),
        "VAE": _code(public_name(config.pretrained_vae_model_name_or_path or "")) or "the base's own",
        "method": "; ".join(methods),
        "adapter": f"{kind}, rank {known['rank']}, alpha {known['alpha']:g}, on {targets}",
        "instance prompt": _code(config.instance_prompt),
        "training images": str(making.images),
        "prior preservation": f"{_code(config.class_prompt or '')}, weight {config.prior_loss_weight:g}"
        if prior
        else "",
        "caption chunks": str(config.caption_chunks) if config.caption_chunks > 1 else "",
        "loss weighted by alpha": f"ground {config.alpha_background_weight:g}" if config.alpha_mask else "",
        "input perturbation": f"{config.ip_noise_gamma:g}" if config.ip_noise_gamma else "",
        "resolution": str(config.resolution),
        "steps": str(known["steps"]),
        "batch size": str(config.train_batch_size * config.gradient_accumulation_steps * making.processes),
        "learning rate": f"{rates}, {config.lr_scheduler}",
        "optimizer": config.optimizer,
        "min-SNR gamma": "" if config.snr_gamma is None else f"{config.snr_gamma:g}",
        "precision": DTYPES.get(making.precision, "float32"),
        "seed": str(known["seed"]),
        "changed on the way": "; ".join(known.get("changes", ())),
        "versions": ", ".join(f"{name} {number}" for name, number in known["versions"].items()),
    }
    cells = [(name, value.replace("|", "\\|")) for name, value in rows.items() if value]
    return "".join(
        f"| {name} | {value} |\n" for name, value in [("setting", "value"), ("---", "---"), *cells]
    )


def _licence(base: str) -> dict[str, str]:
    """The licence of the base in the hub's words: from the base's own card, or known; else nothing."""
    card = Path(base, CARD)
    if not card.is_file():
        return {"license": _KNOWN_LICENCES[base]} if base in _KNOWN_LICENCES else {}
    try:
        data = ModelCard.load(card).data
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    licence = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in licence.items() if isinstance(value, str)}


def _licence_note(base: str) -> str:
    licence = _licence(base)
    name = licence.get("license_name", licence.get("license", "other"))
    if name == "other":
        return f"See that of the base, {_code(public_name(base))}.\n"
    return f"That of the base, {_code(public_name(base))}: {_code(name)}.\n"


def _code(text: str) -> str:
    """Text as a code span in one line; nothing stays nothing."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""
