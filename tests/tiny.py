"""Tiny models built from configurations: nothing is downloaded, and a forward pass takes milliseconds."""

import dataclasses
import json
import os
import random
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes
from flatlora_diffusion.common.errors import RunInterruptedError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.sdxl import lora
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback, TrainingRun
from tests.script import SERVER, Launcher

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def build_unet(seed: int = 0, slim: bool = False) -> UNet2DConditionModel:
    """SDXL's pattern, small; a slim one has attention in the middle only, a quarter of the LoRA layers."""
    cross = "" if slim else "CrossAttn"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", f"{cross}DownBlock2D"),
            up_block_types=(f"{cross}UpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=8,
        )


def build_text_encoders(seed: int = 0, vocab_size: int = 600) -> tuple[torch.nn.Module, torch.nn.Module]:
    config = CLIPTextConfig(
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=vocab_size,
        projection_dim=32,
        max_position_embeddings=77,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_tokenizer() -> CLIPTokenizer:
    characters = (
        [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)] + ["-", ",", "."]
    )
    words = characters + [c + "</w>" for c in characters] + ["ic", "on</w>", "icon</w>"]
    words += [f"unused{index}" for index in range(len(words), 598)]  # ids without gaps, as real ones are
    vocab = {word: index for index, word in enumerate(words)}
    vocab["<|startoftext|>"] = 598
    vocab["<|endoftext|>"] = 599
    return CLIPTokenizer(
        vocab=vocab, merges=[("i", "c"), ("o", "n</w>"), ("ic", "on</w>")], model_max_length=77
    )


def build_pipeline(slim: bool = False) -> StableDiffusionXLPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        )
    one, two = build_text_encoders()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=build_unet(slim=slim),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def unet_inputs(seed: int = 0, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 500, 900][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, 64, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 32, generator=generator),
            "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * batch),
        },
    }


def add_lora(model: torch.nn.Module, targets: list[str] = UNET_TARGETS, seed: int = 1, **config) -> None:
    """Add an adapter whose A and B are both far from zero."""
    name = config.pop("adapter_name", "default")
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(target_modules=targets, **config), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if f"lora_B.{name}" in parameter_name:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline in the diffusers format; its UNet is a slim one."""
    path = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    build_pipeline(slim=True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    """A CLIP with random weights."""
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "hidden_size": 32,
        "vocab_size": 600,
        "max_position_embeddings": 12,
        "bos_token_id": 598,
        "eos_token_id": 599,
        "pad_token_id": 599,
    }
    vision = {**tower, "hidden_size": 24, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    for parameter in model.parameters():  # larger than real ones: features must tell inputs apart
        parameter.data *= 3
    model.half().save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(image_processor=images, tokenizer=build_tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def launcher(pytestconfig, tmp_path_factory) -> Iterator[Launcher]:
    """Runs the script in real processes that need not import anything."""
    own = {"FLATLORA_CACHE": os.environ["FLATLORA_CACHE"]}  # of the session: see `encodings_of_processes`
    if SERVER not in pytestconfig.stash:
        pytest.skip("needs processes that fork")
    launcher = Launcher(pytestconfig.stash[SERVER].orders, tmp_path_factory.mktemp("processes"), own)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session", autouse=True)
def encodings_of_processes(tmp_path_factory):
    """The cache of the commands that tests start: never the user's."""
    os.environ["FLATLORA_CACHE"] = str(tmp_path_factory.getbasetemp() / "encodings-of-processes")


@pytest.fixture(autouse=True)
def own_encodings(monkeypatch, tmp_path_factory):
    """Every test begins with an empty cache."""
    folder = tmp_path_factory.getbasetemp() / "encodings" / uuid.uuid4().hex
    monkeypatch.setenv("FLATLORA_CACHE", str(folder))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test choose its precision: accelerate keeps the first one for the life of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def icons(tmp_path) -> Path:
    """Four icons with transparency, two of them with captions."""
    folder = tmp_path / "icons"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "orange")):
        icon = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
        ImageDraw.Draw(icon).ellipse((3, 3, 15 + index, 20), fill=colour)
        icon.save(folder / f"{colour}.png")
    captions = [
        {"file_name": "red.png", "text": "a red icon"},
        {"file_name": "blue.png", "text": "a blue icon"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    return folder


def global_rng_state() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.fixture
def clean_copy(tmp_path):
    """Copy a folder so that a test may damage it."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def written_adapters(tmp_path_factory) -> dict[str, Path]:
    """Two adapters far from zero, label -> file; tests must leave them as they are."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = {}
    for index, label in enumerate(("LoRA", "Flat-LoRA")):
        unet = build_unet(slim=True)
        unet.requires_grad_(False)
        lora.add_lora({"unet": unet}, rank=4, alpha=8, seed=index)
        generator = torch.Generator().manual_seed(index)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        paths[label] = folder / label / WEIGHTS_NAME
        paths[label].parent.mkdir()
        paths[label].write_bytes(adapter_bytes({"unet": unet}, {}))
    return paths


@pytest.fixture
def adapters(written_adapters, tmp_path) -> dict[str, Path]:
    """Copies of `written_adapters`, for a test that may damage them."""
    for label, path in written_adapters.items():
        shutil.copytree(path.parent, tmp_path / label)
    return {label: tmp_path / label / path.name for label, path in written_adapters.items()}


@pytest.fixture
def config(base_path, icons, tmp_path) -> TrainConfig:
    """A run of a few steps on the tiny base."""
    return TrainConfig(
        pretrained_model_name_or_path=str(base_path),
        instance_data_dir=str(icons),
        instance_prompt="a icon",
        output_dir=str(tmp_path / "run"),
        resolution=16,
        train_batch_size=2,
        max_train_steps=6,
        learning_rate=1e-3,
        report_to="none",
        seed=3,
        validation_resolution=16,  # the base's own, which training sets where it isn't given
    )


def run(
    config: TrainConfig, callbacks: Sequence[Callback] = (), preset=None, **changes
) -> dict[str, torch.Tensor]:
    """Train with some settings changed; the tensors of the adapter's file."""
    config = dataclasses.replace(config, **changes)
    train(config, callbacks, preset)
    return load_file(f"{config.output_dir}/{WEIGHTS_NAME}")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names with the same bits."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stop_after(config: TrainConfig, last: int, **changes) -> None:
    """Train until a Ctrl-C in step `last`, which is finished and saved as a checkpoint."""

    class Stop(Callback):
        def backward(self, run: TrainingRun, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
            if run.step == last - 1:
                signal.raise_signal(signal.SIGINT)
            return compute()

    with pytest.raises(RunInterruptedError, match=f"stopped after step {last} of"):
        run(config, callbacks=[Stop()], **changes)
