"""DeepSpeed's ZeRO: the same training, and the same checkpoints, as plain data parallelism."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.loop import Run
from tests.conftest import assert_equal, run
from tests.processes import SMOOTH, assert_close, in_processes, launched, stop_and_resume
from tests.train.test_resume import command

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed isn't installed", allow_module_level=True)


def zero(stage: int = 2) -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "DS_ACCELERATOR": "cpu",
    }


@pytest.fixture
def config(config, tmp_path) -> TrainConfig:
    return dataclasses.replace(config, **SMOOTH, train_batch_size=1)


def trained_in_two(config: TrainConfig, **environment: str) -> dict[str, torch.Tensor]:
    in_processes(lambda rank: train(config), **environment)
    return load_file(Path(config.output_dir) / WEIGHTS_NAME)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_train_as_one_with_the_same_global_batch(config, tmp_path, stage):
    config = dataclasses.replace(config, train_text_encoder=True)
    alone = run(config, train_batch_size=4, output_dir=str(tmp_path / "alone"))
    together = trained_in_two(dataclasses.replace(config, gradient_accumulation_steps=2), **zero(stage))
    # What no gradient reaches decays with the rest of its flat part; plain AdamW passes it over.
    unreached = "text_encoder.text_model.encoder.layers.2."
    assert_close(
        *({k: v for k, v in tensors.items() if not k.startswith(unreached)} for tensors in (together, alone)),
        3e-5,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16", "flat_sigma": 0.5},
        {"scale_weight_norms": 0.02, "use_ema": True},
        {"train_text_encoder_ti": True, "train_text_encoder_ti_frac": 1.0, "token_abstraction": "icon"},
    ],
    ids=["bf16", "norm limit and EMA", "new tokens"],
)
def test_it_gives_what_data_parallelism_gives(config, tmp_path, settings):
    config = dataclasses.replace(config, **settings)
    plain = trained_in_two(dataclasses.replace(config, output_dir=str(tmp_path / "plain")))
    assert_close(trained_in_two(config, **zero()), plain, 3e-5)


def test_a_stopped_and_resumed_run_has_the_same_bits(config, tmp_path):
    config = dataclasses.replace(config, flat_sigma=0.5, max_train_steps=5, loraplus_lr_ratio=4.0)
    stop_and_resume(config, tmp_path, zero(), zero())
    assert_equal(load_file(tmp_path / "whole" / WEIGHTS_NAME), load_file(tmp_path / "0" / WEIGHTS_NAME))


@pytest.mark.parametrize(("before", "after"), [(zero(), {}), ({}, zero())], ids=["from ZeRO", "to ZeRO"])
def test_a_run_goes_on_without_deepspeed_and_with_it(config, tmp_path, before, after):
    config = dataclasses.replace(config, max_train_steps=5, loraplus_lr_ratio=4.0, train_text_encoder=True)
    stop_and_resume(config, tmp_path, before, after)
    whole, parts = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("whole", "0"))
    unreached = "text_encoder.text_model.encoder.layers.2."
    assert_close(*({k: v for k, v in t.items() if not k.startswith(unreached)} for t in (parts, whole)), 3e-5)


def test_gradients_that_are_not_finite_update_nothing(config):
    loop = Run._loop

    def spoiled(self, start, stop):
        parameters = [p for p in self.learner.base.unet.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        if self.accelerator.process_index == 1:
            parameters[-1].register_hook(lambda gradient: gradient * math.nan)
        with pytest.raises(
            UserError, match="the gradient's norm became inf at step 1 and nothing was updated"
        ):
            loop(self, start, stop)
        assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        raise UserError("as expected")

    def work(rank):
        Run._loop = spoiled
        with pytest.raises(UserError, match="as expected"):
            train(config)

    in_processes(work, **zero())


def test_accelerate_launch_with_the_shipped_configuration(base_path, icons, tmp_path):
    output = tmp_path / "out"
    file = Path(__file__).parents[2] / "assets" / "accelerate" / "deepspeed_zero2.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", 0]
    flags = (
        "--max_train_steps",
        3,
        "--compare",
        "--validation_inference_steps",
        1,
        "--num_validation_images",
        1,
    )
    python, *rest = command(base_path, icons, output, *flags)
    done = launched([python, *launcher, *rest], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output / "flat_lora" / "summary.json").read_text())["processes"] == 2
    assert (output / "comparison.png").is_file()
