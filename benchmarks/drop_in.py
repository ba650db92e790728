"""Whether training in place of diffusers' `train_dreambooth_lora_sdxl.py` ends in the same adapter.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python -m benchmarks.drop_in diffusers                      # all combinations of flags
    python -m benchmarks.drop_in diffusers --case DoRA --output drop-in.md

For each combination the script of the checkout trains a few steps. Its latents, noise, timesteps, captions
and sizes are recorded, with the adapter that it starts from. Then this trainer gets the same flags, that
start (`--lora_weights`), those batches and sigma 0. So what is compared is all that comes between a batch and
the adapter: text encoders, UNet, loss, accumulation, clipping, optimizer, schedules. Crops and draws of the
data are each trainer's own. The difference is that of the adapters, relative to how far the script's went.

The script needs torchvision and, for captions, datasets.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers.utils
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common import DEMO_BASE, machine, report_file, write_report
from flatlora_diffusion.adapter.file import WEIGHTS_NAME, loadable_name
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.data.latents import Batch, LatentCache
from flatlora_diffusion.train.arms import train

SCRIPT = Path("examples", "dreambooth", "train_dreambooth_lora_sdxl.py")
WITHIN_ROUNDING = 1e-4
VERDICTS = ("same bits", "within rounding", "differs", "the script fails")


@dataclass(frozen=True)
class Case:
    """A combination of flags.

    Attributes:
        flags: As typed; CLASS and VAE stand for a folder of class images and that of a VAE.
        captions: The images have captions of their own.
        prediction: What the base predicts.
        why: What is different on purpose, or is a fault of the script's, where something is.
    """

    flags: str = ""
    captions: bool = False
    prediction: str = "epsilon"
    why: str = ""


PRIOR = "--with_prior_preservation --class_data_dir CLASS --class_prompt picture --num_class_images 4"
ENCODERS = "--train_text_encoder --text_encoder_lr 1e-3"
CASES = {
    "defaults": Case(),
    "batch of 2": Case("--train_batch_size 2"),
    "accumulation": Case("--gradient_accumulation_steps 2"),
    "batch of 2, accumulation": Case("--train_batch_size 2 --gradient_accumulation_steps 2"),
    "repeats": Case("--repeats 2"),
    "crop and flip": Case("--center_crop --random_flip"),
    "resolution 20": Case("--resolution 20"),
    "rank 8": Case("--rank 8"),
    "dropout": Case("--lora_dropout 0.1", why="dropout is a function of the seed and the step here"),
    "DoRA": Case("--use_dora"),
    "text encoders": Case(ENCODERS),
    "text encoders, DoRA": Case(f"{ENCODERS} --use_dora"),
    "text encoders, accumulation": Case(f"{ENCODERS} --gradient_accumulation_steps 2"),
    "linear": Case("--lr_scheduler linear --lr_warmup_steps 1"),
    "cosine": Case("--lr_scheduler cosine --lr_warmup_steps 1"),
    "restarts": Case("--lr_scheduler cosine_with_restarts --lr_warmup_steps 0 --lr_num_cycles 2"),
    "polynomial": Case("--lr_scheduler polynomial --lr_warmup_steps 1 --lr_power 2"),
    "warm-up": Case("--lr_scheduler constant_with_warmup --lr_warmup_steps 2"),
    "scale_lr": Case("--scale_lr --train_batch_size 2"),
    "Prodigy": Case("--optimizer prodigy --learning_rate 1"),
    "Prodigy, text encoders": Case(f"{ENCODERS} --optimizer prodigy --learning_rate 1"),
    "AdamW's settings": Case("--adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0.1 --adam_epsilon 1e-6"),
    "8-bit AdamW": Case("--use_8bit_adam"),
    "another optimizer": Case("--optimizer sgd"),
    "clipping": Case("--max_grad_norm 0.001"),
    "min-SNR": Case("--snr_gamma 0.1"),
    "velocity": Case(prediction="v_prediction"),
    "velocity, min-SNR": Case(
        "--snr_gamma 0.1",
        prediction="v_prediction",
        why="the paper's weight min(SNR, gamma) / (SNR + 1); the script has min(SNR, gamma) / SNR + 1",
    ),
    "class images": Case(PRIOR),
    "class images, text encoders": Case(f"{PRIOR} {ENCODERS}"),
    "class images, min-SNR": Case(
        f"{PRIOR} --snr_gamma 0.1",
        why="class images are weighted too; the script takes the weights of both halves for the first",
    ),
    "captions": Case(captions=True),
    "captions, text encoders": Case(ENCODERS, captions=True),
    "checkpointing": Case("--gradient_checkpointing"),
    "checkpointing, text encoders": Case(f"--gradient_checkpointing {ENCODERS}"),
    "bf16": Case("--mixed_precision bf16", why="the adapter is in float32 here; the script has it in bf16"),
    "another VAE": Case("--pretrained_vae_model_name_or_path VAE"),
}


@dataclass
class Recording:
    """What the script did: the adapters that it began and ended with, and what it was shown."""

    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How a combination ended.

    Attributes:
        verdict: One of `VERDICTS`.
        difference: Of the adapters, relative to the script's update; None where there is none to compare.
        remark: Why.
    """

    verdict: str
    difference: float | None = None
    remark: str = ""


def load_script(checkout: Path) -> ModuleType:
    """The script of a checkout as a module, whatever version of diffusers it asks for."""
    spec = importlib.util.spec_from_file_location("diffusers_script", checkout / SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with mock.patch.object(diffusers.utils, "check_min_version", lambda version: None):
        spec.loader.exec_module(script)
    return script


def record(script: ModuleType, words: Sequence[str], folder: Path) -> Recording:
    """Let the script train.

    Args:
        script: See `load_script`.
        words: Its command line, but for the output folder.
        folder: For its output; its first adapter comes into `start/`.
    """
    recording, collated = Recording(), deque()
    collate, scheduler = script.collate_fn, script.DDPMScheduler

    class Recorder(Accelerator):
        def prepare(self, *objects: Any, **settings: Any) -> Any:
            models = [each for each in objects if isinstance(each, nn.Module)]
            if models:
                _save_start(models, folder / "start")
            return super().prepare(*objects, **settings)

    class Scheduler(scheduler):
        def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            shown = collated.popleft()
            sizes = zip(shown["original_sizes"], shown["crop_top_lefts"], strict=True)
            target = (parsed.resolution,) * 2
            ids = torch.tensor([(*size, *corner, *target) for size, corner in sizes])
            batch = Batch(shown["prompts"], latents.clone(), noise.clone(), timesteps.clone(), ids)
            recording.batches.append(batch)
            return super().add_noise(latents, noise, timesteps)

    def collate_and_note(*arguments: Any) -> Any:
        collated.append(collate(*arguments))
        return collated[-1]

    parsed = script.parse_args([*words, "--output_dir", str(folder)])
    vars(script)["args"] = parsed  # its data set reads the global
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.multiple(
        script, Accelerator=Recorder, DDPMScheduler=Scheduler, collate_fn=collate_and_note
    ):
        script.main(parsed)
    recording.start = _named_as_here(load_file(folder / "start" / WEIGHTS_NAME))
    recording.end = _named_as_here(load_file(folder / WEIGHTS_NAME))
    return recording


def _named_as_here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The script's names of text encoders' layers as every reader knows them: see `adapter.file`."""
    named = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        inside = part == "unet" or rest.startswith("text_model.")
        named[loadable_name(name if inside else f"{part}.text_model.{rest}")] = tensor
    return named


def _save_start(models: Sequence[nn.Module], folder: Path) -> None:
    layers = [convert_state_dict_to_diffusers(get_peft_model_state_dict(model)) for model in models]
    unet, one, two = [*layers, None, None][:3]
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=unet, text_encoder_lora_layers=one, text_encoder_2_lora_layers=two
    )


@contextlib.contextmanager
def replayed(batches: Sequence[Batch], class_images: bool) -> Iterator[None]:
    """Let the trainer see these batches; with class images the second half of each is theirs."""
    queue: deque[Batch] = deque()
    for batch in batches:
        size = len(batch.captions) // (2 if class_images else 1)
        for part in (slice(0, size), slice(size, None))[: 1 + class_images]:
            tensors = (batch.latents, batch.noise, batch.timesteps, batch.time_ids)
            queue.append(Batch(batch.captions[part], *(tensor[part] for tensor in tensors)))
    with mock.patch.object(LatentCache, "batch", lambda cache, positions: queue.popleft()):
        yield
    assert not queue, "the trainer takes as many batches as the script"


def compare(script: ModuleType, name: str, files: Path, folder: Path, *, side: int, steps: int) -> Outcome:
    """Train one combination with both.

    Args:
        script: See `load_script`.
        name: One of `CASES`.
        files: See `make_files`.
        folder: Empty, for what both write.
        side: Resolution, but for combinations that have their own.
        steps: Optimizer steps of each.
    """
    case = CASES[name]
    places = {"CLASS": files / "class", "VAE": files / "epsilon" / "vae"}
    flags = [str(places.get(word, word)) for word in case.flags.split()]
    data = ["--instance_data_dir", str(files / "images")]
    if case.captions:
        data = ["--dataset_name", str(files / "captioned"), "--caption_column", "text"]
    words = [
        *("--pretrained_model_name_or_path", str(files / case.prediction), *data),
        *("--instance_prompt", "icon", "--resolution", str(side), "--train_batch_size", "1"),
        *("--learning_rate", "1e-3", "--max_train_steps", str(steps), "--seed", "0", *flags),
    ]
    try:
        theirs = record(script, words, folder / "theirs")
    except Exception as error:  # whatever its faults raise
        return Outcome("the script fails", None, f"{type(error).__name__}: {error}"[:120])
    AcceleratorState._reset_state(reset_partial_state=True)
    start = folder / "theirs" / "start" / WEIGHTS_NAME
    own = ["--output_dir", folder / "ours", "--flat_sigma", 0, "--lora_weights", start, "--report_to", "none"]
    with replayed(theirs.batches, "--with_prior_preservation" in flags):
        train(parse_train_config([*words, *map(str, own)]))
    return outcome(theirs, load_file(folder / "ours" / WEIGHTS_NAME), case.why)


def outcome(theirs: Recording, ours: dict[str, Tensor], why: str = "") -> Outcome:
    """Compare the adapters that both ended with."""
    if theirs.end.keys() != ours.keys():
        return Outcome("differs", None, f"other names: {sorted(theirs.end.keys() ^ ours.keys())[0]}, ...")
    if all(torch.equal(theirs.end[name].float(), ours[name]) for name in ours):
        return Outcome("same bits", 0.0, why)
    off = torch.cat([(ours[name] - theirs.end[name].float()).flatten() for name in ours]).norm()
    went = torch.cat([(theirs.end[name] - theirs.start[name]).float().flatten() for name in ours]).norm()
    difference = (off / went).item()
    return Outcome("within rounding" if difference <= WITHIN_ROUNDING else "differs", difference, why)


def make_files(base: Path, folder: Path, side: int) -> Path:
    """Four pictures without and with captions, class images, the base with either kind of prediction."""
    for kind in ("images", "captioned", "class"):
        (folder / kind).mkdir(parents=True)
        for number in range(4):
            picture = Image.linear_gradient("L").resize((side, side)).rotate(90 * number)
            tint = Image.new("L", (side, side), 60 * number)
            Image.merge("RGB", (picture, tint, picture)).save(folder / kind / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "text": f"icon number {number}"} for number in range(4)]
    (folder / "captioned" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for prediction in ("epsilon", "v_prediction"):
        shutil.copytree(base, folder / prediction)
        config = folder / prediction / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": prediction}))
    return folder


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes in Markdown."""
    verdicts = [each.verdict for each in outcomes.values()]
    counts = [f"{verdicts.count(kind)} {kind}" for kind in VERDICTS if kind in verdicts]
    lines = [
        f"Of {len(outcomes)} combinations of flags: {', '.join(counts)}. {machine()}.",
        "",
        "| combination | flags | outcome | difference | why |",
        "|---|---|---|---|---|",
    ]
    for name, each in outcomes.items():
        difference = "" if each.difference is None else f"{each.difference:.1e}"
        flags = f"`{CASES[name].flags}`" if CASES[name].flags else ""
        lines.append(f"| {name} | {flags} | {each.verdict} | {difference} | {each.remark} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the combinations and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description="See the module.")
    parser.add_argument("checkout", type=Path, help="folder of a checkout of diffusers")
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="SDXL base in a folder (the demo's)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels (128)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each (4)")
    parser.add_argument("--output", type=report_file, help="also write the report to this .md or .json file")
    options = parser.parse_args(arguments)
    if not (options.checkout / SCRIPT).is_file():
        sys.exit(
            f"{options.checkout}: no {SCRIPT} in it; give a checkout of github.com/huggingface/diffusers"
        )
    if importlib.util.find_spec("torchvision") is None:
        sys.exit("the script needs torchvision: pip install torchvision")
    script, outcomes = load_script(options.checkout), {}
    with tempfile.TemporaryDirectory() as place:
        files = make_files(options.base, Path(place, "files"), options.resolution)
        for number, name in enumerate(options.case or CASES):
            folder = Path(place, str(number))
            outcomes[name] = compare(
                script, name, files, folder, side=options.resolution, steps=options.steps
            )
            print(f"{name}: {outcomes[name].verdict}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    report = {name: vars(each) for name, each in outcomes.items()}
    write_report(table(outcomes), {"combinations": report}, options.output)


if __name__ == "__main__":
    main()
