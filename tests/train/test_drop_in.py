"""In place of diffusers' train_dreambooth_lora_sdxl.py: its flags, their defaults, its README's commands."""

import dataclasses
import shlex

import pytest

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.command_line import REFUSED, WITHOUT_EFFECT, field_kind, parse_train_config
from flatlora_diffusion.config.settings import TrainConfig

SWITCH = object()
# Every flag of the script (huggingface/diffusers, examples/dreambooth, 2026): its type and default there.
FLAGS = {
    "pretrained_model_name_or_path": (str, None),
    "pretrained_vae_model_name_or_path": (str, None),
    "revision": (str, None),
    "variant": (str, None),
    "dataset_name": (str, None),
    "dataset_config_name": (str, None),
    "instance_data_dir": (str, None),
    "cache_dir": (str, None),
    "image_column": (str, "image"),
    "caption_column": (str, None),
    "repeats": (int, 1),
    "class_data_dir": (str, None),
    "instance_prompt": (str, None),
    "class_prompt": (str, None),
    "validation_prompt": (str, None),
    "num_validation_images": (int, 4),
    "validation_epochs": (int, 50),
    "do_edm_style_training": (SWITCH, False),
    "with_prior_preservation": (SWITCH, False),
    "prior_loss_weight": (float, 1.0),
    "num_class_images": (int, 100),
    "output_dir": (str, "lora-dreambooth-model"),
    "output_kohya_format": (SWITCH, False),
    "seed": (int, None),
    "resolution": (int, 1024),
    "center_crop": (SWITCH, False),
    "random_flip": (SWITCH, False),
    "train_text_encoder": (SWITCH, False),
    "train_batch_size": (int, 4),
    "sample_batch_size": (int, 4),
    "num_train_epochs": (int, 1),
    "max_train_steps": (int, None),
    "checkpointing_steps": (int, 500),
    "checkpoints_total_limit": (int, None),
    "resume_from_checkpoint": (str, None),
    "gradient_accumulation_steps": (int, 1),
    "gradient_checkpointing": (SWITCH, False),
    "learning_rate": (float, 1e-4),
    "text_encoder_lr": (float, 5e-6),
    "scale_lr": (SWITCH, False),
    "lr_scheduler": (str, "constant"),
    "snr_gamma": (float, None),
    "lr_warmup_steps": (int, 500),
    "lr_num_cycles": (int, 1),
    "lr_power": (float, 1.0),
    "dataloader_num_workers": (int, 0),
    "optimizer": (str, "AdamW"),
    "use_8bit_adam": (SWITCH, False),
    "adam_beta1": (float, 0.9),
    "adam_beta2": (float, 0.999),
    "prodigy_beta3": (float, None),
    "prodigy_decouple": (bool, True),
    "adam_weight_decay": (float, 1e-4),
    "adam_weight_decay_text_encoder": (float, 1e-3),
    "adam_epsilon": (float, 1e-8),
    "prodigy_use_bias_correction": (bool, True),
    "prodigy_safeguard_warmup": (bool, True),
    "max_grad_norm": (float, 1.0),
    "push_to_hub": (SWITCH, False),
    "hub_token": (str, None),
    "hub_model_id": (str, None),
    "logging_dir": (str, "logs"),
    "allow_tf32": (SWITCH, False),
    "report_to": (str, "tensorboard"),
    "mixed_precision": (str, None),
    "prior_generation_precision": (str, None),
    "local_rank": (int, -1),
    "enable_xformers_memory_efficient_attention": (SWITCH, False),
    "rank": (int, 4),
    "lora_dropout": (float, 0.0),
    "use_dora": (SWITCH, False),
    "image_interpolation_mode": (str, "lanczos"),
}
REQUIRED = {
    "pretrained_model_name_or_path": "base",
    "instance_data_dir": "icons",
    "instance_prompt": "an icon",
}
# What is different on purpose: the default here, and why.
DIFFERENT_DEFAULTS = {
    "seed": (0, "every run can be repeated, and goes on where it was killed"),
    "optimizer": ("adamw", "the same: it is taken in any case there too"),
}
# Words that the script takes; those of its flags with a choice, and optimizers in any case.
CHOICES = {
    "lr_scheduler": "linear cosine cosine_with_restarts polynomial constant constant_with_warmup",
    "optimizer": "AdamW adamw prodigy Prodigy",
    "mixed_precision": "no fp16 bf16",
    "prior_generation_precision": "no fp32 fp16 bf16",
    "image_interpolation_mode": "lanczos nearest nearest_exact bilinear bicubic box hamming",
}
# Flags that mean something only with others.
TOGETHER = {
    **dict.fromkeys(("dataset_config_name", "image_column", "caption_column"), ("--dataset_name", "word")),
    **dict.fromkeys(("hub_token", "hub_model_id"), ("--push_to_hub",)),
    "with_prior_preservation": ("--class_data_dir", "class", "--class_prompt", "a picture"),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def parse(*flags):
    required = dict(REQUIRED)
    if "--dataset_name" in flags:  # takes the folder's place
        del required["instance_data_dir"]
    words = [word for name, value in required.items() for word in (f"--{name}", value)]
    return parse_train_config([*words, *flags])


def example(name):
    """A value that the script takes for a flag; other than the default."""
    kind, default = FLAGS[name]
    if kind in (SWITCH, bool):
        return str(not default)
    if name in CHOICES:
        return CHOICES[name].split()[-1]
    return {int: "8", float: "0.25", str: "word"}[kind]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_taken_with_its_default_or_refused_by_name(name, caplog):
    caplog.set_level("INFO")
    kind, default = FLAGS[name]
    flags = [f"--{name}"] if kind is SWITCH else [f"--{name}", example(name)]
    flags = [*TOGETHER.get(name, ()), *flags]
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"^--{name}: .*; leave it out$"):
            parse(*flags)
        return
    parsed = parse(*flags)
    if name in WITHOUT_EFFECT:
        assert parsed == parse()
        assert f"--{name} has no effect here: {WITHOUT_EFFECT[name]}" in caplog.text
        return
    assert name in FIELDS, f"--{name} is neither taken nor refused"
    expected = DIFFERENT_DEFAULTS.get(name, (default,))[0]
    if name not in REQUIRED:
        assert FIELDS[name].default == expected
        assert type(FIELDS[name].default) is type(expected)
    taken = field_kind(FIELDS[name])[0]
    assert taken is (bool if kind is SWITCH else kind) or (name, taken) == ("validation_prompt", tuple)
    assert getattr(parsed, name) != expected


@pytest.mark.parametrize(
    ("name", "word"), [(name, word) for name in CHOICES for word in CHOICES[name].split()]
)
def test_every_word_that_a_flag_takes(name, word):
    assert getattr(parse(f"--{name}", word), name) == word.lower().removesuffix("_exact")


# The commands of examples/dreambooth/README_sdxl.md (Apache License 2.0, The HuggingFace Team).
DOG = """
accelerate launch train_dreambooth_lora_sdxl.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --pretrained_vae_model_name_or_path=$VAE_PATH \
  --output_dir=$OUTPUT_DIR \
  --mixed_precision="fp16" \
  --instance_prompt="a photo of sks dog" \
  --resolution=1024 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=500 \
  --validation_prompt="A photo of sks dog in a bucket" \
  --validation_epochs=25 \
  --seed="0" \
  --push_to_hub
"""
LESS_MEMORY = """
  --enable_xformers_memory_efficient_attention \
  --gradient_checkpointing \
  --use_8bit_adam \
  --mixed_precision="fp16" \
"""
PLAYGROUND = """
accelerate launch train_dreambooth_lora_sdxl.py \
  --pretrained_model_name_or_path="playgroundai/playground-v2.5-1024px-aesthetic"  \
  --instance_data_dir="dog" \
  --output_dir="dog-playground-lora" \
  --mixed_precision="fp16" \
  --instance_prompt="a photo of sks dog" \
  --resolution=1024 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 \
  --use_8bit_adam \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=500 \
  --validation_prompt="A photo of sks dog in a bucket" \
  --validation_epochs=25 \
  --seed="0" \
  --push_to_hub
"""


def arguments(command, more="", **variables):
    """What the script gets when the command is typed into a shell."""
    for name, value in variables.items():
        command = command.replace(f"${name}", str(value))
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_dreambooth_lora_sdxl.py"]
    return [*words[3:], *shlex.split(more)]


VARIABLES = {
    "MODEL_NAME": "stabilityai/stable-diffusion-xl-base-1.0",
    "INSTANCE_DIR": "dog",
    "OUTPUT_DIR": "lora-trained-xl",
    "VAE_PATH": "madebyollin/sdxl-vae-fp16-fix",
}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", {}),
        (LESS_MEMORY, {"gradient_checkpointing": True, "use_8bit_adam": True}),
        ("--train_text_encoder", {"train_text_encoder": True}),
        ("--use_dora", {"use_dora": True}),
        ("--output_kohya_format", {"output_kohya_format": True}),
    ],
    ids=["dog", "less memory", "text encoders", "DoRA", "kohya"],
)
def test_the_commands_of_the_readme_are_understood(more, expected):
    parsed = parse_train_config(arguments(DOG, more, **VARIABLES))
    expected = {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
        "instance_data_dir": "dog",
        "output_dir": "lora-trained-xl",
        "mixed_precision": "fp16",
        "instance_prompt": "a photo of sks dog",
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "report_to": "wandb",
        "lr_warmup_steps": 0,
        "max_train_steps": 500,
        "validation_prompt": ("A photo of sks dog in a bucket",),
        "validation_epochs": 25,
        "seed": 0,
        **expected,
    }
    assert {name: getattr(parsed, name) for name in expected} == expected


def test_edm_style_training_is_refused_by_its_flag():
    """The command without it is understood, and its base refused by its scheduler (test_bad_input.py)."""
    with pytest.raises(UserError, match=r"^--do_edm_style_training: is for Playground v2\.5"):
        parse_train_config(arguments(DOG, "--do_edm_style_training", **VARIABLES))
    assert parse_train_config(arguments(PLAYGROUND)).use_8bit_adam


def test_the_command_of_the_readme_runs(base_path, icons, tmp_path, launcher):
    """On a small base, without a GPU, an account or the net: later flags override those."""
    command = DOG.replace("--push_to_hub", "")
    own = {
        "MODEL_NAME": base_path,
        "INSTANCE_DIR": icons,
        "OUTPUT_DIR": tmp_path,
        "VAE_PATH": base_path / "vae",
    }
    smaller = "--mixed_precision no --resolution 16 --max_train_steps 2 --report_to none "
    smaller += "--num_validation_images 1 --validation_inference_steps 1"
    done = launcher.run(*arguments(command, smaller, **own))
    assert done.code == 0, done.stderr
    assert (tmp_path / WEIGHTS_NAME).is_file() and (tmp_path / "comparison.png").is_file()
