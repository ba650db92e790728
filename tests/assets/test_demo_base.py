"""The recipe of the demo base: its data rules, its optimizer, its resumption, and every stage once."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import micro_autoencoder
import micro_captions
import micro_clip
import micro_data
import micro_export
import micro_models
import micro_muon
import micro_packages
import micro_score
import micro_subjects
import micro_text
import micro_training
import micro_unet
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from micro_captions import STYLE_WORDS
from micro_subjects import (
    BASE_STYLES,
    DEMO_SUBJECTS,
    HELDOUT_SUBJECTS,
    NEW_STYLES,
    STREAMLINE_DEMO_SUBJECTS,
    STREAMLINE_HELDOUT_SUBJECTS,
    STYLES,
    Subject,
)
from PIL import Image
from torch import nn
from train_micro_sdxl import run_stage
from transformers import CLIPModel, CLIPProcessor

OTHERS = tuple(f"thing number {letter}" for letter in "abcdefghijklmnopqrst")
STAND_INS = (*STREAMLINE_DEMO_SUBJECTS, *STREAMLINE_HELDOUT_SUBJECTS)
NAMES = (*DEMO_SUBJECTS, *HELDOUT_SUBJECTS, *STAND_INS, *OTHERS)
HELDOUT_COLOUR = (1, 2, 3)
CPU = torch.device("cpu")


def make_world(folder: Path, names: tuple[str, ...], size: int) -> Path:
    """A work folder as the data stage leaves it, with painted rectangles for icons.

    Of the base styles only noto has all subjects; the others have `OTHERS` and one that is held out.
    """
    rng = np.random.default_rng(0)
    shape = (len(names), size, size, 3)
    images = {style: np.full(shape, 255, np.uint8) for style in STYLES}
    side = size * 15 // 32
    for pictures in images.values():
        for name, picture in zip(names, pictures, strict=True):
            top, left = rng.integers(size // 32, size * 5 // 16, 2)
            held_out = name in HELDOUT_SUBJECTS
            picture[top : top + side, left : left + side] = (
                HELDOUT_COLOUR if held_out else rng.integers(10, 256, 3)
            )
    np.savez(folder / "images.npz", **images)
    subjects = []
    for index, name in enumerate(names):
        styles = STYLES if name in (*OTHERS, HELDOUT_SUBJECTS[0]) else ("noto", *NEW_STYLES)
        icons = dict.fromkeys(styles, name)
        subjects.append(Subject(f"{index:x}", (name, f"{name} too"), ("alpha", "beta"), icons))
    (folder / "subjects.json").write_text(json.dumps([asdict(subject) for subject in subjects]))
    letters = [(left, right + "</w>") for left in "aeiou" for right in "nrstx"]
    whole = [("ve", "st</w>"), ("no", "rm</w>"), ("ve", "n")]
    merges = [("v", "e"), ("n", "o"), ("s", "t</w>"), ("r", "m</w>"), *letters, *whole]
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in merges))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("recipe"), NAMES, micro_data.SIZE)


def test_64_held_out_subjects_are_apart_from_the_demo() -> None:
    assert len(set(HELDOUT_SUBJECTS)) == 64
    assert len(set(DEMO_SUBJECTS)) == 23
    assert not set(HELDOUT_SUBJECTS) & set(DEMO_SUBJECTS)
    assert not set(STAND_INS) & {*DEMO_SUBJECTS, *HELDOUT_SUBJECTS}


@pytest.mark.parametrize(
    ("folder", "count", "subjects"),
    [
        ("icons-streamline", 23, (*DEMO_SUBJECTS, *STREAMLINE_DEMO_SUBJECTS)),
        ("icons-streamline-heldout", 64, (*HELDOUT_SUBJECTS, *STREAMLINE_HELDOUT_SUBJECTS)),
    ],
)
def test_outlined_icons_are_those_that_no_stage_sees(
    folder: str, count: int, subjects: tuple[str, ...]
) -> None:
    assets = Path(__file__).parents[2] / "assets" / folder
    lines = [json.loads(line) for line in (assets / "metadata.jsonl").read_text().splitlines()]
    assert len({line["file_name"] for line in lines}) == count
    assert {line["text"] for line in lines} <= {micro_data.caption("streamline", name) for name in subjects}
    for line in lines:
        with Image.open(assets / line["file_name"]) as picture:
            assert (picture.size, picture.mode) == ((256, 256), "RGBA")


def test_autoencoder_sees_no_held_out_subject_and_nobody_the_demo_in_a_new_style(work: Path) -> None:
    icons = micro_data.load_icons(work)
    seen = icons.autoencoder_images
    assert not (seen == torch.tensor(HELDOUT_COLOUR)).all(dim=-1).any()
    assert len(seen) == len(NAMES) - 64 + len(OTHERS) * (len(STYLES) - 1)
    for style in NEW_STYLES:
        assert {icons.subjects[row].name for row in icons.free(style)} == set(OTHERS)
    assert len(icons.base_pairs()[0]) == len(NAMES) + 5 * (len(OTHERS) + 1)


def test_subjects_are_named_once_and_skipped_where_they_should_be(monkeypatch) -> None:
    chars = {
        "1f436": "dog-face",
        "1f415": "dog",
        "2764": "red-heart",
        "1f1e6": "flag",
        "1f9d1-200d-1f33e": "man-farmer",
        "1f916": "robot",
        "1f996": "t-rex",
        "2693": "anchor",
        "1f550": "one-oclock",
    }
    names = {name: {} for name in chars.values()}
    words = {"🐶": ["dog_face", "dog", "pet", "a1"], "❤️": ["red_heart", "love"], "🐕": ["dog"]}
    words |= {"🤖": ["robot"], "🕐": ["one_o_clock"], "🇦": ["flag"], "🧑‍🌾": ["man_farmer"]}
    words |= {"🦖": ["t_rex"], "⚓": ["anchor"]}
    everywhere = {name: {} for name in names if name not in ("robot", "t-rex")}
    sets = dict.fromkeys(BASE_STYLES, everywhere) | {"noto": names, "streamline": {"dog-face-1": {}}}
    sets["fxemoji"] = {"dog": {}, "dogside": {}, "blackheartsuit": {}, "anchor": {}}

    def read_json(package: str, member: str, raw: Path) -> dict:
        if package == "keywords":
            return words
        if member == "metadata.json":
            return {"categories": {"Flags": ["flag"]}}
        return chars if member == "chars.json" else {"icons": sets[package]}

    monkeypatch.setattr(micro_subjects, "read_json", read_json)
    monkeypatch.setattr(micro_subjects, "fetch", lambda package, raw: raw)
    monkeypatch.setattr(micro_subjects, "list_members", lambda path: ["package/assets/2764-fe0f.webp"])
    # The whole dog and the T-Rex are not among the chosen; the robot is, though noto alone has it here.
    dog, heart, robot, anchor = micro_subjects.read_subjects(Path())
    assert (dog.names, dog.keywords) == (("dog face",), ("pet",))
    assert dog.icons["fxemoji"] == "dog"
    assert dog.icons["streamline"] == "dog-face-1"
    assert heart.names == ("red heart", "heavy black heart")
    assert heart.icons["fluent 3d"] == "package/assets/2764-fe0f.webp"
    assert "fxemoji" not in heart.icons
    assert (robot.name, list(robot.icons)) == ("robot", ["noto"])
    assert set(anchor.icons) == {*BASE_STYLES}


def test_a_changed_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "iconify-json-noto-1.2.9.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="another sha512"):
        micro_packages.fetch("noto", tmp_path)


def test_captions_name_their_subject_and_never_another_style_or_a_new_one(work: Path) -> None:
    subjects = micro_data.load_icons(work).subjects
    captions = micro_captions.Captions(subjects, micro_clip.load_tokenizer(work))
    assert captions.words == captions.ends == ["norm", "vest"]
    assert captions.beginnings == ["ven"]
    generator = torch.Generator().manual_seed(0)
    for style, name in enumerate(BASE_STYLES):
        texts = captions.draw(torch.full((2000,), style), torch.full((2000,), 5), generator)
        assert all(NAMES[5] in text for text in texts)
        others = {word for other, words in STYLE_WORDS.items() if other != name for word in words}
        own = STYLE_WORDS[name]
        assert not any(
            f" {word} " in f" {text} " and not any(word in mine for mine in own)
            for text in texts
            for word in (*others, *NEW_STYLES)
        )
        named = sum(any(word in text for word in own) for text in texts) / len(texts)
        unnamed = micro_captions.PLAIN_SHARE + micro_captions.MEANINGLESS_SHARE
        assert named == pytest.approx(1 - unnamed, abs=0.04)


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


def test_a_stage_that_goes_on_from_an_export_warms_up_and_draws_anew(tmp_path: Path) -> None:
    stage = toy_stage(tmp_path, stop=5)
    path = tmp_path / "toy.ckpt"
    torch.save({"average": stage.average.state_dict(), "step": 5, "seconds": 1.0}, path)
    assert micro_training.is_adopted(tmp_path, "toy")
    adopted = toy_stage(tmp_path, stop=5)
    assert (adopted.step, adopted.first) == (5, 5)
    assert torch.equal(adopted.modules[0].weight, stage.average[0].weight)
    assert not torch.equal(adopted.generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_an_untrained_unet_predicts_its_input() -> None:
    torch.manual_seed(0)
    unet = micro_models.build_unet()
    noise = torch.randn(2, 4, 16, 16)
    conditions = {"text_embeds": torch.randn(2, micro_models.POOLED), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        context = torch.randn(2, micro_models.TOKENS, sum(micro_models.WIDTHS))
        predicted = unet(noise, torch.tensor([999, 999]), context, added_cond_kwargs=conditions).sample
    assert (predicted - noise).square().mean() < 0.01


def test_a_scaled_context_leaves_the_pooled_embedding_as_it_is(work: Path) -> None:
    torch.manual_seed(0)
    tokenizer = micro_clip.load_tokenizer(work)
    encoders = micro_models.build_text_encoders(tokenizer)
    ids = micro_models.tokenize(tokenizer, ["a vest of norm"])
    with torch.no_grad():
        for encoder in encoders:
            for parameter in encoder.parameters():
                parameter.mul_(20)  # far from where the norms' epsilon counts
        context, pooled, _ = micro_models.encode(encoders, ids)
        for encoder in encoders:
            micro_text.scale_context(encoder, 0.25)
        scaled, pooled_then, _ = micro_models.encode(encoders, ids)
    torch.testing.assert_close(scaled, context / 4, rtol=1e-3, atol=1e-3 * context.abs().max().item())
    torch.testing.assert_close(pooled_then, pooled, rtol=1e-3, atol=1e-3 * pooled.abs().max().item())


def test_learning_rate_warms_up_stays_and_falls() -> None:
    factor = micro_training.learning_rate_factor
    assert factor(0, 0, 1000) == pytest.approx(1 / micro_training.WARM_UP_STEPS)
    assert factor(400, 400, 1000) == pytest.approx(1 / micro_training.WARM_UP_STEPS)
    assert factor(500, 0, 1000) == factor(500, 0, 2000) == 1
    assert factor(900, 0, 1000) == pytest.approx(0.5)
    assert factor(1000, 0, 1000) == 0


@pytest.mark.parametrize(("batch", "count"), [(4, 10), (10, 10), (7, 3)])
def test_batches_show_each_row_once_before_any_comes_again(batch: int, count: int) -> None:
    shown = torch.cat([micro_training.rows_of_step(step, batch, count, seed=5) for step in range(30)])
    passes = shown[: len(shown) // count * count].view(-1, count)
    assert all(row.sort().values.equal(torch.arange(count)) for row in passes)
    assert len({tuple(row.tolist()) for row in passes[:3]}) == 3
    assert not shown[:batch].equal(micro_training.rows_of_step(0, batch, count, seed=6))


def test_distorted_icons_keep_their_white_background() -> None:
    pixels = torch.ones(16, 3, 64, 64)
    pixels[:, :, 24:40, 24:40] = -1
    views = micro_clip.distort(pixels, torch.Generator().manual_seed(0))
    assert views.shape == pixels.shape
    assert views[:, :, :4].mean() > 0.9
    assert views[:, :, 29:35, 29:35].mean() < -0.7
    assert not torch.equal(views[0], views[1])


@pytest.mark.slow
def test_every_stage_runs_and_the_export_loads_and_is_gone_on_from(tmp_path: Path, monkeypatch) -> None:
    """With pictures of half the size, and less of everything."""
    for module in (micro_models, micro_export, micro_unet):
        monkeypatch.setattr(module, "IMAGE_SIZE", 64)
    for module in (micro_models, micro_autoencoder):
        monkeypatch.setattr(module, "LATENT_SIZE", 8)
    monkeypatch.setattr(micro_autoencoder, "SIZE", 64)
    monkeypatch.setattr(micro_autoencoder, "CROP", 32)
    names = set(OTHERS)
    for known in ("", "STREAMLINE_"):
        for kind in (f"{known}DEMO_SUBJECTS", f"{known}HELDOUT_SUBJECTS"):
            few = getattr(micro_subjects, kind)[:6]
            names.update(few)
            monkeypatch.setattr(micro_data, kind, few)
    monkeypatch.setattr(micro_autoencoder, "HELDOUT_SUBJECTS", HELDOUT_SUBJECTS[:6])
    (tmp_path / "work").mkdir()
    work = make_world(tmp_path / "work", tuple(sorted(names)), 64)
    monkeypatch.setattr(micro_score, "PROMPTS", 6)
    monkeypatch.setattr(micro_score, "UNKNOWN_SUBJECTS", 2)
    monkeypatch.setattr(micro_score, "BLIND_PROMPTS", 2)
    monkeypatch.setattr(micro_score, "SPEED_REPEATS", 1)
    monkeypatch.setattr(micro_score, "STEPS", 2)
    monkeypatch.setattr(micro_score, "independent_tower", lambda: micro_score.own_tower(work))
    monkeypatch.setattr(micro_text, "RETRIEVAL_POOL", 20)
    monkeypatch.setattr(micro_clip, "PAIRS", 16)
    for module in (micro_autoencoder, micro_text, micro_unet):
        monkeypatch.setattr(module, "BATCH", 8)
    for stage in ("autoencoder", "clip", "text", "unet", "score", "export"):
        run_stage(stage, work, tmp_path, steps=2, device=CPU)

    scores = json.loads((work / "scores.json").read_text())
    assert all(scores[f"{name}_steps"] == 2 for name in ("autoencoder", "clip", "text", "unet"))
    assert 0 <= scores["own_unet_top1"] <= scores["own_unet_top5"] <= 1
    assert scores["own_zorplin"] == scores["independent_zorplin"]
    assert len((work / "blind.txt").read_text().splitlines()) == 2
    icons = micro_data.load_icons(work)
    model = micro_autoencoder.load_autoencoder(work)
    pixels = micro_data.to_pixels(icons.images["noto"][icons.rows(HELDOUT_SUBJECTS[:6])])
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / (decoded - pixels).square().mean().item())
    assert scores["autoencoder_noto"] == pytest.approx(psnr, abs=0.01)

    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "micro-sdxl", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(tmp_path / "micro-clip", dtype=torch.float32)
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

    again = tmp_path / "again"
    again.mkdir()
    for name in ("images.npz", "subjects.json", "merges.txt"):
        (again / name).symlink_to(work / name)
    micro_export.adopt(again, tmp_path)
    for stage, steps in (("autoencoder", 2), ("clip", 2), ("text", 2), ("unet", 3), ("export", 3)):
        run_stage(stage, again, again, steps=steps, device=CPU)
    progress = {stage: micro_training.read_progress(again, stage)["step"] for stage in micro_export.STAGES}
    assert progress == {"autoencoder": 2, "clip": 2, "text": 2, "unet": 3}
    vae = (tmp_path / "micro-sdxl" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (again / "micro-sdxl" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == vae
