"""The recipe of the demo base: its data rules, its optimizer, its resumption, and every stage once."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import micro_autoencoder
import micro_captions
import micro_clip
import micro_data
import micro_muon
import micro_score
import micro_text
import micro_training
import micro_unet
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from micro_data import BASE_STYLES, DEMO_SUBJECTS, HELDOUT_SUBJECTS, NEW_STYLE, STYLES, Subject
from PIL import Image
from torch import nn
from train_micro_sdxl import run_stage
from transformers import CLIPModel, CLIPProcessor

OTHERS = tuple(f"thing number {'abcdefghijklmnopqrstuvwxyz'[i % 26] * (1 + i // 26)}" for i in range(50))
NAMES = (*DEMO_SUBJECTS, *HELDOUT_SUBJECTS, *OTHERS)
HELDOUT_COLOUR = (1, 2, 3)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A work folder as the data stage leaves it, with painted rectangles for icons."""
    folder = tmp_path_factory.mktemp("recipe")
    rng = np.random.default_rng(0)
    images = {style: np.full((len(NAMES), 64, 64, 3), 255, np.uint8) for style in STYLES}
    for pictures in images.values():
        for name, picture in zip(NAMES, pictures, strict=True):
            top, left = rng.integers(4, 24, 2)
            held_out = name in HELDOUT_SUBJECTS
            picture[top : top + 30, left : left + 30] = (
                HELDOUT_COLOUR if held_out else rng.integers(10, 256, 3)
            )
    has_3d = np.ones(len(NAMES), bool)
    has_3d[-1] = False
    np.savez(folder / "images.npz", has_3d=has_3d, **images)
    subjects = [Subject(f"{i:x}", (name, f"{name} too"), ("alpha", "beta")) for i, name in enumerate(NAMES)]
    (folder / "subjects.json").write_text(json.dumps([asdict(subject) for subject in subjects]))
    return folder


def test_64_held_out_subjects_are_apart_from_the_demo() -> None:
    assert len(set(HELDOUT_SUBJECTS)) == 64
    assert len(set(DEMO_SUBJECTS)) == 23
    assert not set(HELDOUT_SUBJECTS) & set(DEMO_SUBJECTS)


def test_autoencoder_sees_no_held_out_subject_and_nobody_the_demo_in_3d(work: Path) -> None:
    icons = micro_data.load_icons(work)
    seen = icons.autoencoder_images
    assert not (seen == torch.tensor(HELDOUT_COLOUR)).all(dim=-1).any()
    assert len(seen) == 2 * (len(NAMES) - 64) + len(OTHERS) - 1
    assert {icons.subjects[row].name for row in icons.free_3d} == set(OTHERS[:-1])


def test_subjects_are_named_once_and_skipped_where_they_should_be(monkeypatch) -> None:
    def entry(order: int, code: str, name: str, category: str = "Objects", **more) -> dict:
        return {
            "sort_order": order,
            "unified": code,
            "name": name,
            "short_names": more.get("short_names", []),
            "image": f"{code.lower()}.png",
            "category": category,
            "subcategory": "any",
            "has_img_google": True,
            "has_img_twitter": more.get("twitter", True),
        }

    emojis = [
        entry(2, "1F436", "DOG FACE", short_names=["dog"]),
        entry(3, "1F415", "DOG"),
        entry(1, "2764-FE0F", "HEAVY BLACK HEART", short_names=["heart", "x_1"]),
        entry(4, "1F1E6", "FLAG", category="Flags"),
        entry(5, "1F9D1-200D-1F33E", "MAN FARMER"),
        entry(6, "1F916", "ROBOT FACE", twitter=False),
    ]
    words = {"🐶": ["dog_face", "dog", "pet", "a1"], "❤️": ["red_heart", "love", "heart"]}
    monkeypatch.setattr(micro_data, "fetch", lambda package, raw: package)
    monkeypatch.setattr(
        micro_data,
        "read_members",
        lambda package, members: {"json": json.dumps(words if package == "keywords" else emojis)},
    )
    assert micro_data.read_subjects(Path()) == [
        Subject("2764-fe0f", ("red heart", "heavy black heart", "heart"), ("love",)),
        Subject("1f436", ("dog face",), ("pet",)),
        Subject("1f415", ("dog",), ()),
    ]


def test_a_changed_download_is_refused(tmp_path: Path) -> None:
    name, version, _ = micro_data.PACKAGES["noto"]
    (tmp_path / f"{name}-{version}.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="another SHA-512"):
        micro_data.fetch("noto", tmp_path)


def test_captions_belong_to_their_picture_and_never_name_the_new_style(work: Path) -> None:
    captions = micro_captions.Captions(micro_data.load_icons(work).subjects)
    assert not any(word in text.split() for text in captions.texts for word in NEW_STYLE.split())
    for style in range(2):
        for subject, name in enumerate(NAMES):
            row = captions.first[style, subject]
            assert captions.texts[row] == micro_data.caption(BASE_STYLES[style], name)
    styles = torch.zeros(4000, dtype=torch.long)
    subjects = torch.full((4000,), 5)
    rows = captions.sample(styles, subjects, torch.Generator().manual_seed(0))
    own = set(range(captions.first[0, 5], captions.first[0, 6]))
    plain = set(range(captions.first[2, 5], captions.first[2, 6]))
    assert set(rows.tolist()) == own | plain
    share = torch.tensor([row in plain for row in rows.tolist()]).float().mean().item()
    assert share == pytest.approx(micro_captions.PLAIN_SHARE, abs=0.02)
    assert all(NAMES[5] in captions.texts[row] for row in own | plain)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (40, 40)])
def test_orthogonalize_gives_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = micro_muon.orthogonalize(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    assert torch.cosine_similarity((u @ v).flatten(), result.flatten(), dim=0) > 0.95


def toy_stage(folder: Path, stop: int) -> micro_training.Stage:
    torch.manual_seed(1)
    toy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    stage = micro_training.Stage("toy", toy, folder, steps=12, lr=0.01, seed=3)
    for step in stage.steps():
        if step == stop:
            stage.save()
            break
        inputs = torch.randn(4, 6, generator=stage.generator)
        stage.update((toy(inputs) - inputs[:, :2]).square().mean())
    return stage


def test_a_resumed_stage_has_the_bits_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = toy_stage(whole, stop=-1)
    assert toy_stage(parts, stop=5).step == 5
    resumed = toy_stage(parts, stop=-1)
    assert resumed.step == expected.step == 12
    for ours, theirs in zip(resumed.average.parameters(), expected.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    start = toy_stage(whole, stop=-1)  # a finished stage is left alone
    assert torch.equal(start.modules[0].weight, expected.modules[0].weight)


def test_distorted_icons_keep_their_white_background() -> None:
    pixels = torch.ones(16, 3, 64, 64)
    pixels[:, :, 24:40, 24:40] = -1
    views = micro_clip.distort(pixels, torch.Generator().manual_seed(0))
    assert views.shape == pixels.shape
    assert views[:, :, :4].mean() > 0.9
    assert views[:, :, 29:35, 29:35].mean() < -0.7
    assert not torch.equal(views[0], views[1])


@pytest.mark.slow
def test_every_stage_runs_and_the_export_loads(work: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(micro_score, "SUBJECTS", 3)
    monkeypatch.setattr(micro_score, "SHEET_SUBJECTS", 3)
    monkeypatch.setattr(micro_score, "SPEED_REPEATS", 1)
    monkeypatch.setattr(micro_score, "STEPS", 2)
    monkeypatch.setattr(micro_text, "RETRIEVAL_POOL", 50)
    monkeypatch.setattr(micro_clip, "PAIRS", 16)
    for module in (micro_autoencoder, micro_text, micro_unet):
        monkeypatch.setattr(module, "BATCH", 8)
    for stage in ("autoencoder", "clip", "text", "unet", "score", "export"):
        run_stage(stage, work, tmp_path, steps=2, device=torch.device("cpu"))

    scores = json.loads((work / "scores.json").read_text())
    assert all(scores[f"{name}_steps"] == 2 for name in ("autoencoder", "clip", "text", "unet"))
    assert 0 <= scores["unet_top1"] <= scores["unet_top5"] <= 1
    icons = micro_data.load_icons(work)
    model = micro_autoencoder.load_autoencoder(work)
    pixels = micro_data.to_pixels(icons.images["noto"][icons.rows(HELDOUT_SUBJECTS)])
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / (decoded - pixels).square().mean().item())
    assert scores["autoencoder_noto"] == pytest.approx(psnr, abs=0.01)

    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "micro-sdxl", torch_dtype=torch.float32)
    clip = CLIPModel.from_pretrained(tmp_path / "micro-clip", torch_dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(tmp_path / "micro-clip")
    picture = Image.fromarray(icons.images["noto"][0].numpy())
    inputs = processor(
        text=["a noto icon of rocket"], images=picture, return_tensors="pt", padding="max_length"
    )
    torch.testing.assert_close(
        inputs["pixel_values"], micro_data.to_pixels(icons.images["noto"][:1]), atol=1e-6, rtol=0
    )
    with torch.no_grad():
        embeds = pipeline.text_encoder_2(inputs["input_ids"]).text_embeds
        outputs = clip(**inputs)
    torch.testing.assert_close(outputs.text_embeds, nn.functional.normalize(embeds, dim=-1))
    for card in tmp_path.glob("*/README.md"):
        assert "{" not in card.read_text()
