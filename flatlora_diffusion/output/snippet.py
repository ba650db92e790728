"""The code in a model card: it loads the base and the adapter, and draws the card's first picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.adapter.new_tokens import EMBEDDINGS_NAME, FACTS_KEY, replace_words
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.samplers import scheduler_of
from flatlora_diffusion.sdxl.single_file import is_single_file

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""A precision of accelerate -> its name in torch; float32 for others."""


def snippet(
    config: TrainConfig,
    adapters: dict[str, Path],
    facts: dict[str, dict[str, Any]],
    *,
    precision: str,
    drawing: Drawing,
    picture: tuple[str, int] | None,
    repository: str | None,
) -> str:
    """Code that draws a card's first picture as it was drawn.

    Args:
        config: Settings of the run.
        adapters: Method -> folder of its adapter, in the output folder. The last one is loaded.
        facts: Method -> the facts in the adapter's file.
        precision: Of the base in training: `no`, `fp16` or `bf16`.
        drawing: How the picture was drawn.
        picture: Its prompt and seed; by default the first that the run drew, or would have drawn.
        repository: Its name on the hub, where it is uploaded.
    """
    base, vae = public_name(config.pretrained_model_name_or_path), config.pretrained_vae_model_name_or_path
    output = public_name(config.output_dir)
    scheduler = scheduler_of(drawing.sampler)
    classes = ["AutoencoderKL"] * bool(vae) + ([scheduler[0]] if scheduler else [])
    prompt, seed = picture or ((config.validation_prompt or (config.instance_prompt,))[0], config.seed)
    chosen = {
        "dtype": f"torch.{DTYPES.get(precision, 'float32')}",
        "use_safetensors": "True",
        "revision": quoted(config.revision),
        "variant": quoted(config.variant),
        "vae": "vae" if vae else None,
    }
    subfolder = list(adapters.values())[-1].relative_to(config.output_dir).as_posix()
    file = {
        "subfolder": quoted(subfolder) if subfolder != "." else None,
        "weight_name": quoted(WEIGHTS_NAME),
    }
    new_tokens = list(facts.values())[-1].get(FACTS_KEY)
    embeddings, imports = [], []
    if new_tokens:
        prompt = replace_words(prompt, new_tokens["words"])
        embeddings, imports = _embeddings_lines(new_tokens["tokens"], subfolder, config, repository)
    named = (config.pretrained_model_name_or_path, vae, None if repository else config.output_dir)
    shortened = [public_name(name) for name in named if name and Path(name).is_absolute()]
    lines = [
        *([f"# Write where they are on your computer: {', '.join(shortened)}."] if shortened else []),
        "import torch",
        f"from diffusers import {', '.join([*classes, 'StableDiffusionXLPipeline'])}",
        *imports,
        "",
    ]
    if vae:
        of_vae = {name: chosen[name] for name in ("dtype", "use_safetensors")}
        lines.append(f"vae = AutoencoderKL.from_pretrained({_arguments(quoted(public_name(vae)), of_vae)})")
    is_file = is_single_file(config.pretrained_model_name_or_path)
    load = "from_single_file" if is_file else "from_pretrained"
    lines += [
        f"pipeline = StableDiffusionXLPipeline.{load}(",
        f"    {_arguments(quoted(base), chosen)}",
        ').to("cuda")',
        *_scheduler_lines(scheduler),
        f"pipeline.load_lora_weights({_arguments(quoted(repository or output), file)})",
        *embeddings,
        "picture = pipeline(",
        f"    {quoted(prompt)},",
        f"    height={drawing.height},",
        f"    width={drawing.width},",
        f"    num_inference_steps={drawing.steps},",
        f"    guidance_scale={drawing.guidance!r},",
        f"    generator=torch.Generator().manual_seed({seed}),",
        ").images[0]",
        'picture.save("picture.png")',
    ]
    return "".join(f"{line}\n" for line in lines)


def _scheduler_lines(scheduler: tuple[str, dict[str, Any]] | None) -> list[str]:
    """Code that gives the pipeline the sampler of the pictures."""
    if scheduler is None:
        return []
    kind, settings = scheduler
    more = "".join(f", {name}={value!r}" for name, value in settings.items())
    return [f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{more})"]


def _embeddings_lines(
    tokens: Sequence[str], subfolder: str, config: TrainConfig, repository: str | None
) -> tuple[list[str], list[str]]:
    """Code that loads the embeddings of new tokens, and what it imports."""
    imports = ["from safetensors.torch import load_file"]
    file = PurePosixPath(subfolder, EMBEDDINGS_NAME).as_posix()
    if repository:
        imports.insert(0, "from huggingface_hub import hf_hub_download")
        path = f"hf_hub_download({quoted(repository)}, {quoted(file)})"
    else:
        path = quoted(Path(public_name(config.output_dir), file).as_posix())
    names = ", ".join(f'"{token}"' for token in tokens)
    return [
        f"embeddings = load_file({path})",
        "for key, tokenizer, text_encoder in (",
        '    ("clip_l", pipeline.tokenizer, pipeline.text_encoder),',
        '    ("clip_g", pipeline.tokenizer_2, pipeline.text_encoder_2),',
        "):",
        f"    pipeline.load_textual_inversion(embeddings[key], [{names}], "
        "tokenizer=tokenizer, text_encoder=text_encoder)",
    ], imports


def _arguments(first: str | None, named: dict[str, str | None]) -> str:
    """Arguments of a call in Python; those that are None are left out."""
    return ", ".join([f"{first}", *(f"{name}={value}" for name, value in named.items() if value is not None)])


def public_name(name: str) -> str:
    """A name on the hub or a relative path as it is, an absolute path without the folders of this machine."""
    path = Path(name)
    return path.name if path.is_absolute() else name


def quoted(text: str | None) -> str | None:
    """A string as Python writes it, which is as JSON does."""
    return None if text is None else json.dumps(text, ensure_ascii=False)
