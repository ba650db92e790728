"""Several processes give the gradients of one with the whole batch; with noise, of the mean over theirs."""

import dataclasses
import functools
import json
import os
import runpy
import signal
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file, save_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.train import class_images, processes, saving, validation
from flatlora_diffusion.train import loop as train_loop
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.processes import join_processes, make_accelerator
from flatlora_diffusion.train.updates import Updates
from tests.processes import SMOOTH, assert_close, in_processes, stop_and_resume
from tests.script import SCRIPT
from tests.tiny import assert_equal, run
from tests.train.test_resume import flags

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "assets" / "accelerate"

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(config, icons, tmp_path) -> TrainConfig:
    for index, colour in enumerate(("navy", "teal", "olive")):
        Image.new("RGB", (24, 40), colour).save(icons / f"tall-{index}.png")
    classes = tmp_path / "class"
    classes.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20 + 4 * index), (80 * index, 90, 30)).save(classes / f"{index}.png")
    return dataclasses.replace(config, class_data_dir=str(classes), class_prompt="a picture")


def losses(config: TrainConfig) -> list[float]:
    return json.loads((Path(config.output_dir) / "summary.json").read_text())["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "two", "one"),
    [
        (
            {"snr_gamma": 5.0},
            {"train_batch_size": 2, "scale_lr": True, "learning_rate": 0.025},
            {"train_batch_size": 4},
        ),
        (
            {
                "train_text_encoder": True,
                "with_prior_preservation": True,
                "num_class_images": 3,
                "prior_loss_weight": 0.7,
                "gradient_checkpointing": True,
            },
            {"train_batch_size": 1, "gradient_accumulation_steps": 2},
            {"train_batch_size": 4},
        ),
        (
            {"train_text_encoder": True, "train_text_encoder_frac": 0.34, "scale_weight_norms": 0.02},
            {"train_batch_size": 1},
            {"train_batch_size": 2},
        ),
        (
            {
                "train_text_encoder_ti": True,
                "train_text_encoder_ti_frac": 0.67,
                "token_abstraction": "icon",
                "use_ema": True,
            },
            {"train_batch_size": 1},
            {"train_batch_size": 2},
        ),
        # A batch has images of one size; two processes have two such batches.
        (
            {"aspect_buckets": True, "resolution": 32, "train_batch_size": 2},
            {},
            {"gradient_accumulation_steps": 2},
        ),
    ],
    ids=[
        "scaled learning rate",
        "text encoders and class images",
        "text encoders that stop",
        "new tokens",
        "aspect buckets",
    ],
)
def test_two_processes_train_as_one_with_the_same_global_batch(config, tmp_path, settings, two, one):
    config = dataclasses.replace(config, **SMOOTH | settings)
    alone = dataclasses.replace(config, **one, output_dir=str(tmp_path / "one"))
    together = dataclasses.replace(config, **two, output_dir=str(tmp_path / "two"))
    adapter = run(alone)
    in_processes(lambda rank: train(together))
    assert_close(load_file(tmp_path / "two" / WEIGHTS_NAME), adapter, 3e-5)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)


def test_each_process_has_noise_of_its_own_and_the_gradient_is_the_mean(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, train_batch_size=1, flat_sigma=0.5, flat_schedule="constant")
    noted, step = tmp_path / "noted.safetensors", 2

    class Note(Callback):
        def backward(self, run, compute):
            loss = compute()
            if run.step == step and run.accelerator.is_main_process:
                named = dict(run.models["unet"].named_parameters())
                trained = {name: p.detach() for name, p in named.items() if p.requires_grad}
                gradients = {f"{name}.grad": named[name].grad for name in trained}
                save_file({**trained, **gradients}, noted)
            return loss

    in_processes(lambda rank: train(config, callbacks=[Note()]))

    # The same gradient in one process, with each noise in turn on the real weights.
    samples = find_samples(Path(config.instance_data_dir), config.instance_prompt)
    learner = Learner(config, make_accelerator(config), samples)
    flat = FlatLoRA(learner.base.unet, sigma=0.5, total_steps=6, schedule="constant", seed=config.seed)
    parameters = {name: p for name, p in learner.base.unet.named_parameters() if p.requires_grad}
    then = load_file(noted)
    for name, parameter in parameters.items():
        parameter.data.copy_(then[name])
    flat.global_step = step
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        weights = {name: layer.get_base_layer().weight for name, layer in flat.layers.items()}
        epsilons = {name: flat.epsilon(name) for name in weights}
        with flat.paused():
            for name, weight in weights.items():
                weight.data += epsilons[name]
            position = step * 2 + rank
            (learner.objective(learner.latents.batch([position])).mean() / 2).backward()
            for name, weight in weights.items():
                weight.data -= epsilons[name]
    gradients = {f"{name}.grad": parameter.grad for name, parameter in parameters.items()}
    assert_close({name: then[name] for name in gradients}, gradients, 1e-4)


def test_only_what_is_trained_is_sent_around(config):
    """The frozen base has gigabytes, and buffers of text encoders leave the accelerator."""

    class Objective(torch.nn.Module):
        def __init__(self, rank):
            super().__init__()
            for name in ("frozen", "trained"):
                self.register_parameter(name, torch.nn.Parameter(torch.tensor([rank + 1.0])))
            self.frozen.requires_grad_(False)
            self.register_buffer("buffer", torch.tensor([rank + 1.0]))

        def forward(self):
            return self.frozen * self.trained * self.buffer

    def work(rank):
        objective = Objective(rank)
        optimizer = torch.optim.SGD([objective.trained], lr=1.0)
        updates = Updates(make_accelerator(config), objective, optimizer, config)
        updates.model().backward()
        tensors = objective.frozen, objective.buffer, objective.trained, objective.trained.grad
        return [tensor.item() for tensor in tensors]

    assert in_processes(work) == [[1, 1, 1, 2.5], [2, 2, 1, 2.5]]  # the gradient is the mean of 1 and 4


def test_what_one_process_does_for_all(config, tmp_path):
    """Held-out losses, pictures, files; in both runs of a comparison. Class images are drawn by both."""
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    Image.new("RGB", (24, 24), "pink").save(heldout / "pink.png")
    config = dataclasses.replace(
        config,
        compare=True,
        train_text_encoder=True,
        with_prior_preservation=True,
        num_class_images=5,
        heldout_data_dir=str(heldout),
        heldout_steps=1,
        max_train_steps=2,
        train_batch_size=1,
        checkpointing_steps=1,
        validation_prompt=("a icon",),
        validation_epochs=1,
        num_validation_images=1,
        validation_inference_steps=1,
        num_train_epochs=1,
    )

    def refuse(*arguments, **settings):
        raise AssertionError("only the main process does this")

    def work(rank):
        if rank:
            for owner, name in (
                (class_images, "_missing"),
                (Learner, "heldout_loss"),
                (validation, "draw_validation"),
                (train_loop, "write_checkpoint"),
                (saving, "write_atomically"),
            ):
                setattr(owner, name, refuse)
        train(config)
        return torch.distributed.is_initialized()

    assert in_processes(work) == [False, False]
    output = Path(config.output_dir)
    assert (output / "comparison.png").is_file()
    drawn = sorted(Path(config.class_data_dir).glob("class-*.png"))
    assert len(drawn) == 2
    by_two = [picture.read_bytes() for picture in drawn]
    for picture in drawn:
        picture.unlink()
    class_images.class_samples(config)
    assert [picture.read_bytes() for picture in drawn] == by_two
    for arm in ("lora", "flat_lora"):
        summary = json.loads((output / arm / "summary.json").read_text())
        assert summary["processes"] == 2 and len(summary["heldout_losses"]) == 2


def test_a_signal_to_one_stops_all_and_the_resumed_run_has_the_same_bits(config, tmp_path):
    config = dataclasses.replace(
        config, flat_sigma=0.5, train_batch_size=1, max_train_steps=5, lora_dropout=0.1
    )
    stop_and_resume(config, tmp_path)
    assert_equal(load_file(tmp_path / "whole" / WEIGHTS_NAME), load_file(tmp_path / "0" / WEIGHTS_NAME))
    assert not (tmp_path / "1").exists()


def test_a_signal_while_the_adapter_is_saved_stops_all(config):
    class Stop(Callback):
        def on_train_end(self, run):
            if not run.accelerator.is_main_process:  # which saves
                os.kill(os.getpid(), signal.SIGTERM)

    def work(rank):
        with pytest.raises(RunInterruptedError, match=f"saved .*{WEIGHTS_NAME}"):
            train(dataclasses.replace(config, max_train_steps=1), callbacks=[Stop()])

    in_processes(work)


def test_a_process_with_other_images_is_refused(config, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (24, 24), "pink").save(other / "pink.png")

    def work(rank):
        folder = str(other) if rank else config.instance_data_dir
        with pytest.raises(UserError, match="process 1 has another images and captions than process 0"):
            train(dataclasses.replace(config, instance_data_dir=folder))

    in_processes(work)
    assert not Path(config.output_dir).exists()


def test_an_error_of_the_main_process_is_everybodys(config):
    def work(rank):
        with pytest.raises(UserError, match="checkpoint-9"):
            train(dataclasses.replace(config, resume_from_checkpoint="checkpoint-9"))

    in_processes(work)


def test_processes_wait_long_for_each_other(monkeypatch):
    seen = {}
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(processes, "PartialState", lambda **settings: seen.update(settings) or state)
    join_processes()
    assert seen["timeout"] >= timedelta(hours=12)
    state.distributed_type = DistributedType.XLA
    with pytest.raises(UserError, match="TPUs"):
        join_processes()


def test_the_scripts_accumulation_counts_not_the_launchers(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=2)
    alone = run(config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert_equal(run(config, output_dir=str(tmp_path / "launched")), alone)


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        (
            "USE_DEEPSPEED",
            "DeepSpeed splits optimizer states or weights .* whole rows .* use data parallelism",
        ),
        ("USE_FSDP", "FSDP splits weights .* whole rows .* use data parallelism"),
        ("USE_MEGATRON_LM", "Megatron-LM splits weights"),
        ("USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism splits weights"),
    ],
)
def test_what_cannot_train_is_refused(config, monkeypatch, variable, told):
    monkeypatch.setenv(f"ACCELERATE_{variable}", "true")
    with pytest.raises(UserError, match=f"^{told}.*assets/accelerate/ddp.yaml"):
        train(dataclasses.replace(config, with_prior_preservation=True))
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP splits weights"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "DeepSpeed splits optimizer states or weights",
        ),
    ],
    ids=["FSDP", "DeepSpeed"],
)
def test_the_script_refuses_sharding(base_path, icons, tmp_path, capfd, environment, told):
    output = tmp_path / "out"

    def script(rank):
        sys.argv = [str(PROJECT / SCRIPT), *flags(base_path, icons, output)]
        with pytest.raises(SystemExit) as left:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return left.value.code

    assert in_processes(script, 1, **environment) == [2]
    said = capfd.readouterr().err
    assert said.startswith(f"error: {told}") and said.count("\n") == 1
    assert not output.exists()


def set_variables(**variables: str) -> None:
    os.environ.update(variables)


def test_accelerate_launch_with_the_shipped_configuration(config, base_path, icons, tmp_path, launcher):
    output = tmp_path / "out"
    words = flags(base_path, icons, output, "--max_train_steps", 3, "--mixed_precision", "no")
    launch = ("-m", "accelerate.commands.launch", "--config_file", CONFIGS / "ddp.yaml")
    own = {"ACCELERATE_USE_CPU": "true", "FLATLORA_CACHE": os.environ["FLATLORA_CACHE"]}
    prepare = functools.partial(set_variables, **own)
    done = launcher.run(*launch, "--main_process_port", 0, SCRIPT, *words, prepare=prepare)
    assert done.code == 0, done.stderr[-3000:]
    assert done.stderr.count("saved ") == 1, "only the main process should report"
    assert json.loads((output / "summary.json").read_text())["processes"] == 2
    # The forked processes of the other tests are a fair stand-in for launched ones.
    same = dataclasses.replace(
        config,
        flat_sigma=0.5,
        train_batch_size=1,
        max_train_steps=3,
        random_flip=True,
        seed=5,
        output_dir=str(tmp_path / "forked"),
    )
    in_processes(lambda rank: train(same))
    assert_equal(load_file(output / WEIGHTS_NAME), load_file(tmp_path / "forked" / WEIGHTS_NAME))


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("ddp.yaml", ["--num_processes", "8"], {"multi_gpu": True, "num_machines": 1, "num_processes": 8}),
        (
            "multi_node.yaml",
            ["--machine_rank", "1", "--main_process_ip", "10.0.0.7"],
            {"multi_gpu": True, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.7"},
        ),
    ],
)
def test_accelerate_understands_the_shipped_configurations(file, flags, expected):
    words = ["--config_file", str(CONFIGS / file), *flags, "train_dreambooth_flat.py"]
    given, _, precision_is_from_file = _validate_launch_command(launch_command_parser().parse_args(words))
    assert {name: getattr(given, name) for name in expected} == expected
    assert given.mixed_precision == "bf16" and precision_is_from_file
