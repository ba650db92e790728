"""The demo assets are complete, small, safe to load, and work offline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.evaluate.likeness import Likeness

ASSETS = Path(__file__).resolve().parents[2] / "assets"
ICONS = ASSETS / "icons-3d"
HELDOUT = ASSETS / "icons-3d-heldout"
FLAT = ASSETS / "icons-flat"
MODEL = ASSETS / "micro-sdxl"
CLIP = ASSETS / "micro-clip"
ADAPTERS = ASSETS / "adapters"
TEMPLATE = "a fluent 3d icon of "


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(
        MODEL, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def captions_of(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {line["file_name"]: line["text"] for line in lines}


@pytest.mark.parametrize(("folder", "count"), [(ICONS, 23), (HELDOUT, 64)])
def test_icons_have_transparency_and_captions(folder: Path, count: int) -> None:
    files = sorted(folder.glob("*.png"))
    assert len(files) == count
    captions = captions_of(folder)
    assert sorted(captions) == [file.name for file in files]
    for file in files:
        assert captions[file.name] == TEMPLATE + file.stem.replace("_", " ")
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("RGBA", (256, 256)), file.name
            assert image.getchannel("A").getextrema() == (0, 255), file.name


def test_held_out_subjects_are_not_trained() -> None:
    assert not set(captions_of(ICONS)) & set(captions_of(HELDOUT))


def test_flat_icons_show_each_subject_in_both_styles_and_none_that_is_trained() -> None:
    captions = captions_of(FLAT)
    assert sorted(captions) == sorted(file.name for file in FLAT.glob("*.png"))
    subjects = {"noto": set(), "twemoji": set()}
    for name, text in captions.items():
        style, subject = name.removesuffix(".png").replace("_", " ").split(" ", 1)
        assert text == f"a {style} icon of {subject}"
        subjects[style].add(subject)
        with Image.open(FLAT / name) as image:
            assert (image.mode, image.size) == ("RGBA", (256, 256)), name
            assert image.getchannel("A").getextrema() == (0, 255), name
    assert subjects["noto"] == subjects["twemoji"]
    trained, heldout = (
        {text.removeprefix(TEMPLATE) for text in captions_of(folder).values()} for folder in (ICONS, HELDOUT)
    )
    assert len(captions) == 2 * len(subjects["noto"]) == 64
    assert len(subjects["noto"] & heldout) == 16
    assert not subjects["noto"] & trained


@pytest.mark.parametrize(
    ("folder", "limit"),
    [
        (ICONS, 1_500_000),
        (HELDOUT, 4_000_000),
        (FLAT, 1_000_000),
        (MODEL, 60_000_000),
        (CLIP, 10_000_000),
        (ADAPTERS, 2_000_000),
    ],
)
def test_folders_stay_small_and_tell_their_licences(folder: Path, limit: int) -> None:
    assert size_of(folder) < limit
    licences = ("Apache License 2.0", "CC-BY-4.0") if folder == FLAT else ("MIT",)
    assert all(licence in (folder / "README.md").read_text() for licence in licences)


@pytest.mark.parametrize("folder", [MODEL, CLIP, ADAPTERS])
def test_there_are_no_pickles(folder: Path) -> None:
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".safetensors", ".md"} <= suffixes <= {".safetensors", ".json", ".md", ".png"}


def test_the_model_is_an_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.unet.config.use_linear_projection
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    widths = [pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.in_channels == 4
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}


def test_any_word_has_tokens(pipeline: StableDiffusionXLPipeline) -> None:
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        assert tokenizer.model_max_length == encoder.config.max_position_embeddings
        for prompt in ("a Zxqvj icon of crème brûlée", "苹果 #42!", "a fluent 3d icon of red apple"):
            ids = tokenizer(prompt).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            # The end token doubles as the unknown one: inside a prompt it would mean a lost word.
            assert tokenizer.eos_token_id not in ids[:-1]
            assert max(ids) < encoder.config.vocab_size
        # The ids of CLIP itself, which SDXL has.
        assert tokenizer("a photo of a cat").input_ids[1:-1] == [320, 1125, 539, 320, 2368]


def test_it_draws_128_pixels_by_default(pipeline: StableDiffusionXLPipeline) -> None:
    images = pipeline(
        ["a noto icon of red apple", "a fluent 3d icon of red apple"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 128, 128, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.01


def test_clip_knows_the_flat_icons_by_their_captions() -> None:
    """CLIP-T of true pictures: for nearly all the nearest of all captions of the style is their own."""
    likeness = Likeness(str(CLIP))
    samples = find_samples(FLAT, "")
    pictures = likeness.pictures([open_image(sample.path) for sample in samples])
    captions = [sample.caption for sample in samples]
    similarity = pictures @ likeness.texts(captions).T
    for style in (slice(0, 32), slice(32, 64)):
        nearest = similarity[style, style].argmax(dim=1)
        assert (nearest == torch.arange(32)).float().mean() > 0.9, captions[style.start]


@pytest.mark.slow
def test_clip_recognises_what_the_model_draws(pipeline: StableDiffusionXLPipeline) -> None:
    """CLIP-T: for most drawings the nearest of all held-out captions of the style is their own."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32, use_safetensors=True)
    processor = CLIPProcessor.from_pretrained(CLIP)
    subjects = [text.removeprefix(TEMPLATE) for text in captions_of(HELDOUT).values()]
    hits = []
    for style in ("noto", "twemoji"):
        prompts = [f"a {style} icon of {subject}" for subject in subjects]
        asked = prompts[::8]
        images = pipeline(
            asked,
            num_inference_steps=6,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(asked))],
        ).images
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding="max_length")
        with torch.no_grad():
            nearest = clip(**inputs).logits_per_image.argmax(dim=1)
        hits += [prompts[index] == prompt for index, prompt in zip(nearest, asked, strict=True)]
    assert sum(hits) / len(hits) > 0.5


def test_both_encoders_of_clip_are_those_of_the_model(pipeline: StableDiffusionXLPipeline) -> None:
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32, use_safetensors=True)
    shipped = pipeline.text_encoder_2.state_dict()
    own = clip.state_dict()
    assert shipped
    assert all(torch.equal(own[name], tensor) for name, tensor in shipped.items())


@pytest.mark.parametrize(("name", "method"), [("lora", "LoRA"), ("flat_lora", "Flat-LoRA")])
def test_the_adapters_are_what_the_demo_trains(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ASSETS.parent)
    config = parse_train_config(["--config", "assets/demo.yaml"])
    facts = read_facts(ADAPTERS / name / WEIGHTS_NAME)
    assert facts["method"] == method
    assert facts["flat_sigma"] == (config.flat_sigma if name == "flat_lora" else 0)
    assert (facts["rank"], facts["steps"]) == (config.rank, config.max_train_steps)
    assert (facts["base"], facts["seed"]) == (config.pretrained_model_name_or_path, config.seed)


@pytest.mark.slow
def test_the_adapters_change_what_is_drawn() -> None:
    pipeline = load_pipeline(str(MODEL))
    drawing = Drawing(128, 128, steps=5, guidance=3.0)
    for name in ("lora", "flat_lora"):
        load_adapter(pipeline, name, ADAPTERS / name)
    pictures = [
        np.asarray(draw_with(pipeline, adapter, "a fluent 3d icon of red heart", 0, drawing), dtype=float)
        for adapter in (None, "lora", "flat_lora")
    ]
    assert np.abs(pictures[1] - pictures[0]).mean() > 1
    assert np.abs(pictures[2] - pictures[0]).mean() > 1
