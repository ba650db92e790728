"""Bases and VAEs in one file with the original repository's names: the same weights as their folders'."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import single_file as tool
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.pipeline import native_side_of
from flatlora_diffusion.evaluate.command import evaluation_parser
from flatlora_diffusion.evaluate.evaluation import Evaluation
from flatlora_diffusion.evaluate.request import read_plan
from flatlora_diffusion.grid.command import main as grid
from flatlora_diffusion.output.card import CARD
from flatlora_diffusion.sdxl import single_file
from flatlora_diffusion.sdxl.base import BASE_FLAG, check_base, load_base, load_vae
from tests.tiny import assert_equal, run

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DEMO = Path(__file__).parents[2] / "assets" / "micro-sdxl"


def made_of(base: Path, folder: Path) -> Path:
    file = folder / f"{base.name}.safetensors"
    tool.main([str(base), str(file)])
    return file


@pytest.fixture(scope="module")
def file(base_path, tmp_path_factory) -> Path:
    return made_of(base_path, tmp_path_factory.mktemp("single"))


def changed(file: Path, tmp_path: Path, change, **metadata) -> Path:
    """A copy with its configurations, some of whose tensors are others."""
    tensors = load_file(file)
    change(tensors)
    copy = tmp_path / "changed.safetensors"
    save_file(tensors, copy, metadata=metadata or None)
    (tmp_path / "changed").symlink_to(file.with_suffix(""))
    return copy


@pytest.mark.parametrize("base", ["tiny", "demo"])
def test_it_is_the_base_that_the_folder_is(base, base_path, tmp_path):
    folder = base_path if base == "tiny" else DEMO
    file = made_of(folder, tmp_path)
    ours, theirs = load_base(str(file), dtype=torch.float16), load_base(str(folder), dtype=torch.float16)
    pipelines = ours.pipeline(), theirs.pipeline()
    for part in PARTS:
        one, other = (getattr(pipeline, part) for pipeline in pipelines)
        assert_equal(one.state_dict(), other.state_dict())
        assert {tensor.dtype for tensor in one.state_dict().values()} == {other.dtype}
        assert not one.training and not any(p.requires_grad for p in one.parameters())
        assert not any(tensor.is_meta for tensor in (*one.parameters(), *one.buffers()))
    assert pipelines[0].scheduler.config == pipelines[1].scheduler.config
    assert ours.noise_scheduler.config == theirs.noise_scheduler.config
    texts = ["a red icon", "two, icons"]
    assert ours.tokenizers[1](texts).input_ids == theirs.tokenizers[1](texts).input_ids
    assert native_side_of(str(file)) == native_side_of(str(folder))


@pytest.mark.slow
def test_a_run_and_a_grid_are_those_of_the_folder(config, file, base_path, tmp_path):
    config = dataclasses.replace(config, max_train_steps=3)
    trained = run(config, pretrained_model_name_or_path=str(file))
    # But for rounding: weights in the pages of a folder's files are aligned in another way.
    assert_close(trained, run(config, output_dir=str(tmp_path / "folder")), rtol=1e-3, atol=1e-5)
    card = (Path(config.output_dir) / CARD).read_text()
    assert "from_single_file(" in card and "base_model" not in card
    pictures = []
    for base in (file, base_path):
        out = tmp_path / f"grid-{base.name}"
        words = ["--base", str(base), "--steps", "1", "--prompt", "a icon", "--device", "cpu"]
        grid([*words, "--adapter", f"A={config.output_dir}", "--output", str(out)])
        files = sorted(out.glob("*seed*"))
        pictures.append(np.stack([np.asarray(Image.open(picture), dtype=int) for picture in files]))
    assert len(pictures[0]) == 2 and abs(pictures[0] - pictures[1]).max() <= 1


def test_an_evaluation_takes_it(file, icons, adapters):
    words = ["--base", str(file), "--adapter", f"A={adapters['LoRA']}", "--heldout", str(icons)]
    plan = read_plan(vars(evaluation_parser().parse_all([*words, "--instance_prompt", "x"])))
    assert Evaluation(plan, icons).resolution == native_side_of(str(file))


@pytest.mark.parametrize("named_by", ["tensor", "metadata"])
def test_it_says_itself_that_it_predicts_velocity_without_signal_at_the_end(file, tmp_path, named_by):
    def change(tensors):
        tensors["ztsnr"] = torch.tensor([])
        if named_by == "tensor":
            tensors["v_pred"] = torch.tensor([])

    metadata = {"modelspec.prediction_type": "v"} if named_by == "metadata" else {}
    base = load_base(str(changed(file, tmp_path, change, **metadata)))
    for scheduler in (base.noise_scheduler, base.sampler):
        assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
    assert base.noise_scheduler.alphas_cumprod[-1] == 0
    assert base.sampler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("names", ["original", "diffusers", "of a base"])
def test_a_vae_may_be_a_file_too(names, file, base_path, tmp_path):
    copy = tmp_path / "vae.safetensors"
    tensors = load_file(file)
    if names == "original":
        prefix = "first_stage_model."
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if names == "diffusers":
        tensors = load_file(base_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, copy)
    copy.with_suffix("").symlink_to(file.with_suffix(""))
    expected = AutoencoderKL.from_pretrained(base_path / "vae").state_dict()
    assert_equal(load_vae(str(copy)).state_dict(), expected)


def test_a_file_without_a_vae_needs_one(file, base_path, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.startswith("first_stage_model.")]:
            del tensors[key]

    base = str(changed(file, tmp_path, change))
    with pytest.raises(UserError, match="has no VAE; give one with --pretrained_vae_model_name_or_path"):
        load_base(base)
    assert load_base(base, vae=str(base_path / "vae")).vae is not None


def without(prefix):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


def only(**tensors):
    def change(found):
        found.clear()
        found.update({key.replace("__", "."): torch.zeros(1) for key in tensors})

    return change


def inpainting(tensors):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = torch.zeros(len(tensors[key]), 9, 3, 3)


def refiner(tensors):
    without("conditioner.")(tensors)
    tensors["conditioner.embedders.0.model.ln_final.bias"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only(lora_unet_x__lora_down__weight=1), "a LoRA, not a base; give the SDXL base that it is for"),
        (only(cond_stage_model__x=1), "a base of SD 1.5 or 2; give an SDXL base"),
        (only(double_blocks__0=1), r"no SDXL base \(it has double_blocks.0\)"),
        (only(edm_mean=1), "an EDM base"),
        (refiner, "the SDXL refiner"),
        (inpainting, "an inpainting base, whose UNet takes 9 channels"),
        (without("model.diffusion_model.label_emb"), "its UNet takes no text and time embedding"),
        (without("conditioner.embedders.1."), "has no text encoders"),
        (
            without("model.diffusion_model.out.0.bias"),
            r"unet: 1 weights are missing from its file \(conv_norm",
        ),
    ],
)
def test_other_files_are_named(file, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        load_base(str(changed(file, tmp_path, change)))
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_another_architecture_are_named(file, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a sound safetensors file"):
        check_base(str(damaged), BASE_FLAG)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(
        UserError, match=r"doesn't fit the configuration .* put the right ones into a folder beside"
    ):
        load_base(str(alone))


def test_the_tokenizers_are_those_of_sdxl():
    """Known numbers of CLIP's vocabulary; the second tokenizer fills up with the sign of number 0."""
    first, second = (single_file.clip_tokenizer(padding) for padding in ("<|endoftext|>", "!"))
    read = [t("a photo of a cat", padding="max_length").input_ids for t in (first, second)]
    known = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert read == [known + [49407] * 70, known + [0] * 70]


def test_the_configurations_are_those_of_sdxl():
    """The number of weights of each part of stable-diffusion-xl-base-1.0."""
    home = single_file.CONFIGURATIONS
    index = json.loads((home / "model_index.json").read_text())
    assert all((home / part).is_dir() for part in (*PARTS, "scheduler"))
    with torch.device("meta"):
        counts = {}
        for part in PARTS:
            module, name = index[part]
            kind = getattr(importlib.import_module(module), name)
            if part.startswith("text"):
                model = kind(kind.config_class.from_pretrained(home, subfolder=part))
            else:
                model = kind.from_config(kind.load_config(home, subfolder=part))
            counts[part] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
