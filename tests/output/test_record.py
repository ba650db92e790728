"""What a run says of itself: which settings decide its result, its method, the versions."""

import dataclasses
from types import SimpleNamespace

import pytest

from flatlora_diffusion.common.packages import LIBRARIES
from flatlora_diffusion.config.settings import FLAT, PLAIN, TrainConfig
from flatlora_diffusion.output import record
from flatlora_diffusion.output.names import ARMS

ALONE = SimpleNamespace(mixed_precision="no", num_processes=1)  # an accelerator, as far as it decides
NOT_DECIDING = {
    *("instance_data_dir", "compare", "gradient_checkpointing", "max_train_steps", "num_train_epochs"),
    *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("logging_dir", "report_to", "validation_prompt", "num_validation_images", "validation_epochs"),
    *("validation_inference_steps", "validation_guidance_scale", "repeats"),
    *("class_data_dir", "num_class_images", "sample_batch_size", "prior_generation_precision"),
    *("heldout_data_dir", "heldout_split", "heldout_steps", "output_kohya_format"),
    *("dataset_name", "dataset_config_name", "cache_dir", "image_column", "caption_column"),
    *("train_text_encoder_frac", "train_text_encoder_ti_frac"),
    *("final_inference_steps", "validation_sampler", "validation_resolution", "class_resolution"),
    *("push_to_hub", "hub_token", "hub_model_id", "kohya_folders", "lora_weights", "cache"),
    "deterministic",
}


def make_config(**settings) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="base",
        instance_data_dir="icons",
        instance_prompt="an icon",
        **settings,
    )


def facts(config: TrainConfig) -> dict:
    settings = record.deciding_settings(config, 100, "digest", ALONE)
    return record.facts(config, settings, {}, 100)


def test_the_settings_that_do_not_decide_are_these():
    """Checkpoints on disk were written without them: a change keeps those from being resumed."""
    found = {field.name for field in dataclasses.fields(TrainConfig) if not field.metadata["decides"]}
    assert found == NOT_DECIDING
    settings = record.deciding_settings(make_config(flat_schedule="constant"), 100, "digest", ALONE)
    assert not settings.keys() & NOT_DECIDING


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "a71bb3c910a89edf9864f0d39007bc4759394a5aaa13ed3bf5651e60680abedb"),
        (
            {
                "flat_sigma": 0.0,
                "train_text_encoder": True,
                "train_text_encoder_frac": 0.5,
                "rank": 8,
                "validation_prompt": ("a",),
            },
            "dde853425d4eeee58fcfd4cab0fd174b3801fbc9bd77cd2527f855c34596a08d",
        ),
    ],
    ids=["defaults", "others"],
)
def test_the_hash_of_the_settings_is_that_of_runs_on_disk(settings, digest):
    """As version 0.1.0 wrote it. A new setting that decides changes it: then these are to be replaced."""
    assert facts(make_config(**settings))["settings_sha256"] == digest


@pytest.mark.parametrize(("sigma", "method", "folder"), [(0.0, PLAIN, "lora"), (0.05, FLAT, "flat_lora")])
def test_sigma_alone_decides_the_method(sigma, method, folder):
    config = make_config(flat_sigma=sigma)
    assert config.method == facts(config)["method"] == method == {0.0: "LoRA", 0.05: "Flat-LoRA"}[sigma]
    assert ARMS[method] == folder


def test_versions_are_those_of_the_packages_that_decide(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.8.0+cu128")
    found = facts(make_config())["versions"]
    assert list(found) == [*LIBRARIES, "accelerate"]
    assert found["torch"] == "2.8.0+cu128", "with the build, which its metadata may leave out"
