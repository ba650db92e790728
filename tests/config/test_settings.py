"""Flags, configuration files, defaults: everything between the command line and a validated `TrainConfig`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from flatlora_diffusion.common.command import nearest
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.command_line import ADDITIONS, parse_train_config
from flatlora_diffusion.config.settings import TrainConfig

ROOT = Path(__file__).parents[2]
REQUIRED = {
    "pretrained_model_name_or_path": "base",
    "instance_prompt": "an icon",
}
GIVEN = REQUIRED | {"instance_data_dir": "icons"}
GIVEN_FLAGS = [word for name, value in GIVEN.items() for word in (f"--{name}", value)]

# Every flag of diffusers' train_dreambooth_lora_sdxl.py that this script has too, with its default there.
# `seed` is the one that differs: None there, 0 here, so that every run can be repeated.
DIFFUSERS_DEFAULTS = {
    "instance_data_dir": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "output_dir": "lora-dreambooth-model",
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "rank": 4,
    "image_interpolation_mode": "lanczos",
    "repeats": 1,
    "class_data_dir": None,
    "class_prompt": None,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "sample_batch_size": 4,
    "prior_generation_precision": None,
    "snr_gamma": None,
    "lora_dropout": 0.0,
    "use_dora": False,
    "optimizer": "adamw",
    "use_8bit_adam": False,
    "output_kohya_format": False,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
}
OURS = {
    "quantize_base": None,
    "kohya_folders": False,
    "caption_chunks": 1,
    "alpha_mask": False,
    "alpha_background_weight": 0.0,
    "cache": True,
    "deterministic": False,
    "stop_when_worse": None,
    "folds": None,
    "lora_weights": None,
    "background": "white",
    "lora_alpha": None,
    "use_rslora": False,
    "caption_dropout_rate": 0.0,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "init_lora_weights": "gaussian",
    "scale_weight_norms": None,
    "use_ema": False,
    "ema_decay": 0.999,
    "heldout_data_dir": None,
    "heldout_split": None,
    "heldout_steps": 50,
    "aspect_buckets": False,
    "lora_layers": None,
    # As in the advanced diffusers script.
    "train_text_encoder_frac": 1.0,
    "train_text_encoder_ti": False,
    "train_text_encoder_ti_frac": 0.5,
    "token_abstraction": "TOK",
    "num_new_tokens_per_abstraction": 2,
    "noise_offset": 0.0,
    "ip_noise_gamma": 0.0,
    "text_encoder_2_lr": None,
    "loraplus_lr_ratio": None,
    "flat_sigma": 0.1,
    "flat_schedule": "cosine",
    "flat_noise": "table",
    "compare": False,
    "seed": 0,
    "validation_inference_steps": 50,
    "validation_guidance_scale": 5.0,
    "validation_sampler": "DPM++ 2M",
    "validation_resolution": None,
    "final_inference_steps": None,
    "class_resolution": None,
}


def config(**values):
    return TrainConfig(**GIVEN | values)


def parse(*flags):
    return parse_train_config([*GIVEN_FLAGS, *map(str, flags)])


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Defaults.


def test_defaults_are_those_of_the_diffusers_script():
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name in REQUIRED:
        assert defaults.pop(name) is dataclasses.MISSING
    assert defaults == DIFFUSERS_DEFAULTS | OURS
    for name, value in (DIFFUSERS_DEFAULTS | OURS).items():
        assert type(defaults[name]) is type(value), name


def test_a_command_line_without_options_gives_the_defaults():
    assert parse() == config()
    assert dataclasses.asdict(parse()) == DIFFUSERS_DEFAULTS | OURS | GIVEN


def test_alpha_defaults_to_the_rank():
    assert config(rank=16).alpha == 16
    assert config(rank=16, lora_alpha=4.0).alpha == 4


# Flags.


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--center_crop"], True),
        (["--center_crop", "true"], True),
        (["--center_crop=False"], False),
        (["--center_crop", "0"], False),
        (["--no-center_crop"], False),
        (["--center_crop", "--no-center_crop"], False),
    ],
)
def test_switches_are_turned_on_and_off(flags, expected):
    assert parse(*flags).center_crop is expected


def test_switches_that_are_on_by_default_can_be_turned_off():
    assert parse("--prodigy_decouple", "False").prodigy_decouple is False
    assert parse("--no-prodigy_decouple").prodigy_decouple is False
    assert parse().prodigy_decouple is True


@pytest.mark.parametrize("flags", [["--center_crop", "perhaps"], ["--no-center_crop", "true"]])
def test_other_words_after_a_switch_are_refused(flags):
    with pytest.raises(UserError, match=rf"{flags[0]} {flags[1]}: the word after it must be true or false"):
        parse(*flags)


def test_flags_that_mean_nothing_here_are_taken_and_said(caplog):
    caplog.set_level("INFO")
    xformers = "--enable_xformers_memory_efficient_attention"
    assert parse("--dataloader_num_workers", 4, "--local_rank", -1, xformers) == config()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "--dataloader_num_workers has no effect here",
        "--local_rank has no effect here",
        f"{xformers} has no effect here",
    ]


@pytest.mark.parametrize("name", ["do_edm_style_training"])
def test_flags_of_the_diffusers_script_that_are_not_here_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=rf"^--{name}: .*leave it out$"):
        parse(f"--{name}")


def test_every_kind_of_flag():
    parsed = parse(
        *("--rank", 16, "--learning_rate", "3e-4", "--lora_alpha", 8, "--train_text_encoder"),
        *("--no-center_crop", "--mixed_precision", "bf16", "--max_train_steps=12"),
        *("--validation_prompt", "a fox", "an owl"),
    )
    assert parsed == config(
        rank=16,
        learning_rate=3e-4,
        lora_alpha=8.0,
        train_text_encoder=True,
        mixed_precision="bf16",
        max_train_steps=12,
        validation_prompt=("a fox", "an owl"),
    )
    assert isinstance(parsed.lora_alpha, float)
    assert isinstance(parsed.validation_prompt, tuple), "a frozen configuration holds nothing that can change"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--rnk", "--rank"),
        ("--flat_sigam=0.1", "--flat_sigma"),
        ("--learning-rate", "--learning_rate"),
        ("--no-compar", "--no-compare"),
        ("--res", None),  # --resolution, or --resume_from_checkpoint
        (
            "--flat_sig",
            "--flat_sigma",
        ),  # of this script only: a later option could change its meaning
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_known_one(flag, meant):
    with pytest.raises(UserError) as error:
        parse(flag, 4)
    message = str(error.value)
    assert message.startswith(f"unknown argument {flag.partition('=')[0]}")
    assert meant is None or message.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_train", 12], {"max_train_steps": 12}),
        (["--learning=3e-4"], {"learning_rate": 3e-4}),
        (["--lora", 0.5], {"lora_dropout": 0.5}),  # the one flag there that begins so; here there are more
        (["--train_text"], {"train_text_encoder": True}),
        (["--validation_e", 3, "--hub_t", "secret"], {"validation_epochs": 3, "hub_token": "secret"}),
        (["--validation_prompt", "--rank 8 a fox"], {"validation_prompt": ("--rank 8 a fox",)}),
    ],
)
def test_flags_of_the_diffusers_script_are_abbreviated_as_there(flags, expected):
    assert parse(*flags) == config(**expected)


@pytest.mark.parametrize("flag", ["--no-cache", "--no_cache"])
def test_the_cache_is_only_switched_off(flag):
    """`--cache` is short for `--cache_dir`, as in the diffusers script."""
    assert parse(flag) == config(cache=False)
    assert parse("--cache", "here") == parse("--cache=here") == config(cache_dir="here")


def test_what_may_not_be_abbreviated_is_what_the_diffusers_script_has_not():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields - DIFFUSERS_DEFAULTS.keys() - {"seed"} - REQUIRED.keys() | {"cache_latents"} == ADDITIONS


@pytest.mark.parametrize("word", ["sgd", "AdaFactor"])
def test_another_optimizer_is_adamw_as_in_the_diffusers_script(word, caplog):
    assert parse("--optimizer", word) == config()
    assert caplog.messages == [f"--optimizer {word}: not one of adamw, prodigy; AdamW is taken"]


def test_8_bits_have_no_effect_on_prodigy_as_in_the_diffusers_script(caplog):
    assert parse("--optimizer", "prodigy", "--use_8bit_adam") == config(optimizer="prodigy")
    assert caplog.messages == ["--use_8bit_adam has no effect with --optimizer prodigy"]


def test_the_choices_are_those_that_there_are():
    from flatlora_diffusion.config.settings import FLAT_NOISES, FLAT_SCHEDULES, VALIDATION_SAMPLERS
    from flatlora_diffusion.draw.samplers import SAMPLERS
    from flatlora_diffusion.flat.noise import SCHEDULES, SOURCES

    assert VALIDATION_SAMPLERS == SAMPLERS
    assert tuple(SCHEDULES) == FLAT_SCHEDULES
    assert tuple(SOURCES) == FLAT_NOISES


@pytest.mark.parametrize(("given", "steps"), [({}, 25), ({"validation_inference_steps": 8}, 8)])
def test_the_pictures_after_training_have_25_steps_as_in_the_diffusers_script(given, steps):
    assert config(**given).final_steps == steps
    assert config(**given, final_inference_steps=40).final_steps == 40


def test_no_pictures_are_prompts_without_use():
    assert config(validation_prompt=("a fox",)).prompts_to_draw == ("a fox",)
    assert config(validation_prompt=("a fox",), num_validation_images=0).prompts_to_draw == ()


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("zzzzzzzz", ["rank", "seed"]) == ""
    with pytest.raises(UserError, match=r"^unknown argument --qqqqqqqqqqqqq$"):
        parse("--qqqqqqqqqqqqq")


def test_a_stray_word_is_an_error():
    with pytest.raises(UserError, match="stray"):
        parse("stray")


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_required_flag_is_named(missing):
    flags = [word for name in REQUIRED if name != missing for word in (f"--{name}", "x")]
    with pytest.raises(UserError, match=rf"^missing: --{missing}$"):
        parse_train_config(flags)


def test_all_missing_flags_are_named_at_once():
    with pytest.raises(UserError, match=", ".join(f"--{name}" for name in REQUIRED)):
        parse_train_config([])


@pytest.mark.parametrize(
    "flags",
    [
        ("--rank", "four"),
        ("--rank", "4.0"),
        ("--learning_rate", "fast"),
        ("--rank",),
        ("--validation_prompt",),
        ("--seed", "1e3"),
        ("--compare=perhaps",),
    ],
)
def test_an_ill_typed_flag_is_named(flags):
    with pytest.raises(UserError) as error:
        parse(*flags)
    message = str(error.value)
    assert flags[0].partition("=")[0] in message
    assert len(flags) == 1 or flags[1] in message
    assert "\n" not in message
    assert "usage" not in message


# The configuration file.


def test_a_file_with_every_kind_of_value(yaml_file):
    path = yaml_file(
        "pretrained_model_name_or_path: base\n"
        "instance_data_dir: icons\n"
        "instance_prompt: an icon\n"
        "learning_rate: 1e-4\n"  # text to YAML 1.1
        "text_encoder_lr: 0.5\n"
        "lora_alpha: 8\n"
        "rank: 16\n"
        "train_text_encoder: true\n"
        "center_crop: no\n"
        "validation_prompt:\n  - a fox\n  - an owl\n"
        "max_train_steps: null\n"
        "mixed_precision: bf16\n"
        "revision: 2\n"  # a number that is meant as text
    )
    parsed = parse_train_config(["--config", str(path)])
    expected = config(
        learning_rate=1e-4,
        text_encoder_lr=0.5,
        lora_alpha=8.0,
        rank=16,
        train_text_encoder=True,
        center_crop=False,
        validation_prompt=("a fox", "an owl"),
        mixed_precision="bf16",
        revision="2",
    )
    assert parsed == expected
    for field in dataclasses.fields(TrainConfig):
        assert type(getattr(parsed, field.name)) is type(getattr(expected, field.name)), field.name


def test_flags_override_the_file(yaml_file):
    path = yaml_file("rank: 16\ncompare: true\nvalidation_prompt: a fox\nmax_train_steps: 9\nseed: 3\n")
    parsed = parse("--config", path, "--rank", 2, "--no-compare", "--validation_prompt", "an owl", "a cat")
    assert parsed == config(rank=2, validation_prompt=("an owl", "a cat"), max_train_steps=9, seed=3)
    assert parse("--rank", 2, "--config", path).rank == 2, "whatever the order"


def test_a_flag_overrides_the_file_even_with_the_default(yaml_file):
    assert parse("--config", yaml_file("rank: 16\n"), "--rank", 4).rank == 4


def test_a_single_prompt_in_the_file_is_one_prompt(yaml_file):
    assert parse("--config", yaml_file("validation_prompt: a fox\n")).validation_prompt == ("a fox",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flat_sigam: 0.1", ["unknown setting flat_sigam", "did you mean flat_sigma?"]),
        ("7: 0.1", ["unknown setting 7"]),
        ("rank: four", ["rank must be a whole number, not 'four'"]),
        ("rank: 4.5", ["rank must be a whole number, not 4.5"]),
        ("rank: true", ["rank must be a whole number, not True"]),
        ("rank:", ["rank must be a whole number, not None"]),
        ("learning_rate: fast", ["learning_rate must be a number, not 'fast'"]),
        ("learning_rate: true", ["learning_rate must be a number, not True"]),
        ("learning_rate: [1e-4]", ["learning_rate must be a number"]),
        ("compare: 1", ["compare must be true or false, not 1"]),
        ("compare: maybe", ["compare must be true or false, not 'maybe'"]),
        ("output_dir: [a, b]", ["output_dir must be text"]),
        ("output_dir: false", ["output_dir must be text"]),
        ("instance_prompt:", ["instance_prompt must be text"]),
        ("validation_prompt: 7", ["validation_prompt must be text or a list, not 7"]),
        ("rank: [", ["not YAML"]),
        ("a: b: c", ["not YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not YAML"]),
        ("- rank\n- 4", ["must hold lines of the form `name: value`"]),
        ("", ["must hold lines of the form `name: value`"]),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(yaml_file, text, expected):
    path = yaml_file(text)
    with pytest.raises(UserError) as error:
        parse("--config", path)
    message = str(error.value)
    assert message.startswith(f"--config {path}: ")
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_missing_file_a_folder_and_bytes_that_are_no_text(tmp_path):
    for path, reason in [(tmp_path / "none.yaml", "no such file"), (tmp_path, "is a directory")]:
        with pytest.raises(UserError, match=reason) as error:
            parse("--config", path)
        assert str(path) in str(error.value)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"rank: \xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: not YAML"):
        parse("--config", binary)


# Ranges.

DATASET = {"instance_data_dir": None, "dataset_name": "a/b"}
POSITIVE = [
    *("rank", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "checkpointing_steps"),
    *("validation_inference_steps", "final_inference_steps", "resolution"),
    *("max_train_steps", "checkpoints_total_limit", "lora_alpha", "max_grad_norm", "lr_num_cycles"),
]
NOT_NEGATIVE = [
    *(
        "flat_sigma",
        "validation_epochs",
        "num_validation_images",
        "learning_rate",
        "text_encoder_lr",
        "lr_warmup_steps",
        "adam_weight_decay",
        "seed",
    ),
    *("adam_weight_decay_text_encoder", "adam_epsilon", "validation_guidance_scale"),
]


def number(name, value):
    kinds = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    return float(value) if kinds[name].startswith("float") else value


@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_greater_than_0(name):
    config(**{name: number(name, 8)})
    for value in (0, -8):
        with pytest.raises(UserError, match=rf"^--{name} {number(name, value)}: must be greater than 0$"):
            config(**{name: number(name, value)})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_what_must_be_0_or_more(name):
    config(**{name: number(name, 0)})
    with pytest.raises(UserError, match=rf"^--{name} {number(name, -1)}: must be 0 or more$"):
        config(**{name: number(name, -1)})


FLOATS = [field.name for field in dataclasses.fields(TrainConfig) if str(field.type).startswith("float")]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_must_be_finite(name, value):
    with pytest.raises(UserError, match=rf"^--{name} {value}: must be a finite number$"):
        config(**{name: float(value)})


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2"])
def test_betas(name):
    assert getattr(config(**{name: 0.0}), name) == 0
    for value in (1.0, -0.1, 2.0):
        with pytest.raises(UserError, match=rf"--{name} {value}: must be in \[0, 1\)"):
            config(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 7}, "--resolution 7: must be 8 or more"),
        (
            {"resolution": 100, "aspect_buckets": True},
            "--aspect_buckets with --resolution 100: the sides of buckets are multiples of 8",
        ),
        ({"validation_resolution": 100}, "--validation_resolution 100: must be a multiple of 8"),
        ({"class_resolution": 100}, "--class_resolution 100: must be a multiple of 8"),
        ({"validation_sampler": "PLMS"}, "--validation_sampler PLMS: not one of default, Euler, "),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler cosin: not one of linear, cosine, "),
        ({"mixed_precision": "fp8"}, "--mixed_precision fp8: not one of no, fp16, bf16"),
        ({"flat_schedule": "step"}, "--flat_schedule step: not one of cosine, linear, constant"),
        ({"flat_noise": "pink"}, "--flat_noise pink: not one of table, gaussian"),
        ({"image_interpolation_mode": "best"}, "--image_interpolation_mode best: not one of nearest, "),
        ({"compare": True, "flat_sigma": 0.0}, "--compare with --flat_sigma 0 would train plain LoRA twice"),
        ({"instance_data_dir": None}, "give --instance_data_dir or --dataset_name"),
        ({"dataset_name": "a/b"}, "--instance_data_dir and --dataset_name: give only one of them"),
        ({"heldout_split": "test"}, "--heldout_split is for --dataset_name"),
        (DATASET | {"heldout_split": "train"}, "--heldout_split train: that split is trained"),
        (
            DATASET | {"heldout_split": "test", "heldout_data_dir": "icons"},
            "--heldout_data_dir and --heldout_split: give only one of them",
        ),
        ({"caption_dropout_rate": 1.1}, "--caption_dropout_rate 1.1: must be in [0, 1]"),
        ({"caption_dropout_rate": -0.1}, "--caption_dropout_rate -0.1: must be in [0, 1]"),
        ({"shuffle_caption": True, "keep_tokens": -1}, "--keep_tokens -1: must be 0 or more"),
        ({"keep_tokens": 1}, "--keep_tokens is for --shuffle_caption"),
        ({"lora_layers": ("to_q", "to_k=")}, '--lora_layers "to_k=": must be NAME or NAME=RANK'),
        ({"lora_layers": ("to_q=4.5",)}, '--lora_layers "to_q=4.5": must be NAME or NAME=RANK'),
        ({"lora_layers": ("to_q,,to_k",)}, '--lora_layers "": must be NAME or NAME=RANK'),
        ({"lora_layers": ("to_q=0",)}, "--lora_layers to_q=0: a rank must be 1 or more"),
    ],
)
def test_other_rules(values, message):
    with pytest.raises(UserError) as error:
        config(**values)
    assert str(error.value).startswith(message)


def test_layers_may_have_commas_between_them():
    parted = config(lora_layers=("to_k, to_q", "down_blocks.2.*=8"))
    assert parted.lora_layers == ("to_k", "to_q", "down_blocks.2.*=8") and parted.has_own_ranks
    assert not config(lora_layers=("to_k=4",)).has_own_ranks, "that is the rank of all"


def test_a_seed_that_no_generator_takes():
    """A torch generator takes 64 bits; pictures are drawn with seeds counted from --seed, after training."""
    assert config(seed=2**32).seed == 2**32
    with pytest.raises(UserError, match="--seed"):
        config(seed=2**64)


@pytest.mark.parametrize(
    "values",
    [
        DATASET,
        DATASET | {"heldout_split": "test"},
        {"caption_dropout_rate": 0.0},
        {"caption_dropout_rate": 1.0},
        {"shuffle_caption": True, "keep_tokens": 1},
    ],
)
def test_what_is_allowed(values):
    config(**values)


# What happens before torch is imported.


def run_python(*arguments, timeout=60):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "numpy", "PIL")
NAME_HEAVY = f"import sys; print(','.join(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"


@pytest.mark.parametrize("module", ["flatlora_diffusion", "flatlora_diffusion.config.command_line"])
def test_importing_needs_no_heavy_library(module):
    result = run_python("-c", f"import {module}\n{NAME_HEAVY}")
    assert (result.returncode, result.stderr.strip()) == (0, "")


def test_help_needs_no_heavy_library():
    script = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: exec({NAME_HEAVY!r}))\n"
        "sys.argv = ['train_dreambooth_flat.py', '--help']\n"
        "runpy.run_path('train_dreambooth_flat.py', run_name='__main__')"
    )
    result = run_python("-c", script)
    assert (result.returncode, result.stderr.strip()) == (0, "")
    shown = " ".join(result.stdout.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in shown
    assert "relative to each filter; 0 is plain LoRA. (default: 0.1)" in shown
    assert shown.count("(required)") == len(REQUIRED)


def test_the_package_exports_what_it_names():
    import flatlora_diffusion

    for name in flatlora_diffusion.__all__:
        public = getattr(flatlora_diffusion, name)
        assert callable(public) and public.__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="no attribute 'FlatLora'"):
        flatlora_diffusion.FlatLora  # noqa: B018


def test_what_scripts_import_from_the_wings_goes_on_working():
    from flatlora_diffusion import config, grid, stamp, train

    assert config.TrainConfig is TrainConfig
    assert grid.draw_grid.__module__ == grid.draw_cells.__module__ == "flatlora_diffusion.grid.draw"
    assert stamp.read.__module__ == "flatlora_diffusion.draw.stamp"
    with pytest.raises(AttributeError, match="no attribute 'draws'"):
        grid.draws  # noqa: B018
    for call in (train, train.train):  # the wing, and the function in it
        with pytest.raises(UserError, match="no such folder"):
            call(
                TrainConfig(pretrained_model_name_or_path="/gone", instance_data_dir="-", instance_prompt="a")
            )
