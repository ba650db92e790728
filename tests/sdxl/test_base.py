"""The one loader of bases: what it gives, and what it refuses in all that load one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from flatlora_diffusion.app.flags import parse_app_arguments
from flatlora_diffusion.app.serve import serve
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.evaluate.command import main as evaluate
from flatlora_diffusion.grid.command import main as grid
from flatlora_diffusion.sdxl.base import load_base, load_vae
from flatlora_diffusion.train.arms import train

MODELS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@pytest.mark.parametrize("vae", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_drawing_has_the_pipeline_that_diffusers_loads(dtype, vae, base_path):
    own = {"vae": str(base_path / "vae")} if vae else {}
    ours = load_pipeline(str(base_path), dtype=dtype, **own)
    theirs = StableDiffusionXLPipeline.from_pretrained(base_path, dtype=dtype, add_watermarker=False)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert ours.scheduler.config == theirs.scheduler.config
    assert type(ours.scheduler) is type(theirs.scheduler)
    for name in MODELS:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert not one.training
        tensors, expected = one.state_dict(), other.state_dict()
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key])


def a_weight_gone(part):
    def damage(base: Path) -> str:
        file = base / part / f"{MODELS[part]}.safetensors"
        tensors = load_file(file)
        del tensors[(gone := sorted(tensors)[-1])]
        save_file(tensors, file, metadata={"format": "pt"})
        return rf"{part}: 1 weights are missing from its files \({gone}, \.\.\.\)"

    return damage


def another_unet(base: Path) -> str:
    file = base / "unet" / "config.json"
    settings = json.loads(file.read_text()) | {"addition_embed_type": None}
    file.write_text(json.dumps(settings))
    return "its UNet takes no text and time embedding, so it isn't SDXL's"


def settings_of(part, **changes):
    """Another configuration of a part, or of the pipeline itself."""

    def change(base: Path) -> None:
        file = base / ("model_index.json" if part == "pipeline" else f"{part}/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def told(change, message):
    def damage(base: Path) -> str:
        change(base)
        return message

    return damage


def refiner(base: Path) -> str:
    settings_of("pipeline", text_encoder=[None, None], tokenizer=[None, None])(base)
    shutil.rmtree(base / "text_encoder")
    return "the SDXL refiner, which has one text encoder; give the SDXL base"


def no_vocabulary(base: Path) -> str:
    (base / "tokenizer_2" / "tokenizer.json").unlink()
    return "tokenizer_2"


DAMAGE = {
    **{f"a weight of the {part} gone": a_weight_gone(part) for part in MODELS},
    "another UNet": another_unet,
    "no vocabulary": no_vocabulary,
    "a refiner": refiner,
    "inpainting": told(settings_of("unet", in_channels=9), "an inpainting base, whose UNet takes 9 channels"),
    "editing": told(
        settings_of("unet", in_channels=8), "an instruct-pix2pix base, whose UNet takes 8 channels"
    ),
    "a VAE of more channels": told(
        settings_of("vae", latent_channels=16), "its UNet takes 4 channels and gives 4, .* its VAE has 16"
    ),
    "a VAE of four colours": told(settings_of("vae", out_channels=4), "vae: a VAE that takes 3 .* gives 4"),
    "prompts of another width": told(
        settings_of("unet", cross_attention_dim=32), r"its UNet takes prompts of 32 .* give 32 \+ 32"
    ),
    "five time ids": told(
        settings_of("unet", projection_class_embeddings_input_dim=72),
        r"its UNet takes 72 .* gets 32 \+ 6 x 8",
    ),
    "too few embeddings": told(
        settings_of("text_encoder_2", vocab_size=500),
        "tokenizer_2: its tokens go up to 599, and the text encoder has 500 embeddings",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_base_that_lacks_something_is_refused_by_all(
    name, base_path, written_adapters, icons, config, tmp_path
):
    base = Path(shutil.copytree(base_path, tmp_path / "base"))
    told = DAMAGE[name](base)
    adapter = ("--base", str(base), "--adapter", f"a={written_adapters['LoRA']}", "--device", "cpu")
    votes = ("--votes", str(tmp_path / "votes"))
    prompt = ("--prompt", "a icon", "--output", str(tmp_path / "grid"))
    pictures = ("--heldout", str(icons), "--instance_prompt", "a icon", "--output", str(tmp_path / "values"))
    ways = {
        "--pretrained_model_name_or_path": [
            lambda: train(dataclasses.replace(config, pretrained_model_name_or_path=str(base)))
        ],
        "--base": [
            lambda: serve(parse_app_arguments([*adapter, *votes])),
            lambda: grid([*adapter, *prompt]),
            lambda: evaluate([*adapter, *pictures]),
        ],
    }
    for flag, starts in ways.items():
        for start in starts:
            with pytest.raises(UserError, match=f"^{flag} {base}: {told}") as refused:
                start()
            assert "\n" not in str(refused.value)


def test_bases_of_another_objective_are_only_drawn_with(base_path, tmp_path):
    base = Path(shutil.copytree(base_path, tmp_path / "base"))
    EDMEulerScheduler().save_pretrained(base / "scheduler")
    index = base / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "EDMEulerScheduler"]})
    )
    assert type(load_pipeline(str(base)).scheduler) is EDMEulerScheduler
    with pytest.raises(UserError, match="its scheduler is EDMEulerScheduler, and EDM-style training isn't"):
        load_base(str(base))


@pytest.mark.parametrize("named", [{}, {"variant": "fp16"}, {"variant": "fp16", "revision": "other"}])
def test_an_own_vae_is_loaded_with_what_it_has_of_the_base_s_variant(base_path, tmp_path, caplog, named):
    """In its own variant where there is one; else without, and the log says so."""
    caplog.set_level("INFO")
    vae = AutoencoderKL.from_pretrained(base_path, subfolder="vae")
    vae.save_pretrained(tmp_path)
    loaded = load_vae(str(tmp_path), named.get("revision"), named.get("variant"))
    assert torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight)
    told = f"--pretrained_vae_model_name_or_path {tmp_path}: no variant fp16 there; loaded without"
    assert [message for message in caplog.messages if "variant" in message] == [told] * ("variant" in named)
    vae.quant_conv.weight.data.fill_(2)
    vae.save_pretrained(tmp_path, variant="fp16")
    caplog.clear()
    loaded = load_vae(str(tmp_path), named.get("revision"), named.get("variant"))
    assert torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight) == ("variant" in named)
    assert told not in caplog.messages


def test_the_revision_reaches_an_own_vae(base_path, monkeypatch):
    asked = []
    original = AutoencoderKL.from_pretrained

    def load(name, **settings):
        asked.append(settings.pop("revision", None))
        return original(name, **settings)

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", load)
    load_base(str(base_path), vae=str(base_path / "vae"), revision="other")
    assert asked == ["other"]
