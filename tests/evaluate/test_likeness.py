"""What a CLIP says of drawn pictures, against closed forms; and pictures that are drawn only once."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPModel, CLIPProcessor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data.images import Sample, composite, find_samples
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.evaluate import drawn
from flatlora_diffusion.evaluate import likeness as evaluate_likeness
from flatlora_diffusion.evaluate.drawn import Drawer, Personalisation, Retention, fingerprint
from flatlora_diffusion.evaluate.likeness import (
    Likeness,
    drift,
    nearest_similarity,
    paired_similarity,
    pixel_drift,
)
from tests.tiny import global_rng_state

DRAWING = Drawing(16, 24, steps=1, guidance=1.0)
WANTED = [("a red icon", 0), ("a blue icon", 1), ("a green icon", 2)]


@pytest.fixture(scope="module")
def likeness(clip_path) -> Likeness:
    return Likeness(str(clip_path))


def icon(colour: str, mode: str = "RGBA", size: tuple[int, int] = (24, 20)) -> Image.Image:
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((3, 3, 15, 17), fill=colour)
    return picture.convert(mode)


# The measures.


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in a plane."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_the_similarity_of_pairs_is_their_mean_cosine():
    one, other = at_angles(0, 10, 200), at_angles(60, 10, 110)
    assert paired_similarity(one, other) == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-7)
    assert paired_similarity(one, one) == pytest.approx(1, abs=1e-7)


def test_drift_is_one_minus_the_mean_cosine_and_nothing_for_the_same():
    one, other = at_angles(0, 10, 200), at_angles(60, 100, 20)
    assert drift(one, other) == pytest.approx((0.5 + 1 + 2) / 3, abs=1e-7)
    features = torch.nn.functional.normalize(torch.randn(9, 20, generator=torch.Generator().manual_seed(0)))
    assert drift(features, features) == 0


def test_the_nearest_training_picture_counts():
    pictures, training = at_angles(0, 90), at_angles(180, 150, -60)
    # 0 degrees is nearest to -60, 90 to 150; both at 60 degrees.
    assert nearest_similarity(pictures, training) == pytest.approx(0.5, abs=1e-7)
    assert nearest_similarity(pictures, torch.cat([training, pictures.flip(0)])) == pytest.approx(1, abs=1e-7)


def test_drift_of_pixels():
    def grey(value: int, size=(4, 2)) -> Image.Image:
        return Image.new("RGB", size, (value,) * 3)

    assert pixel_drift([grey(51)], [grey(51)]) == 0
    assert pixel_drift([grey(0), grey(102)], [grey(255), grey(51)]) == pytest.approx((1 + 0.2) / 2)
    assert pixel_drift([grey(51)], [grey(102)]) == pixel_drift([grey(102)], [grey(51)]) == pytest.approx(0.2)
    half = grey(0)
    half.paste((255, 0, 0), (0, 0, 2, 2))  # one of three channels of half of the pixels
    assert pixel_drift([half], [grey(0)]) == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="have no difference; give two of one size"):
        pixel_drift([grey(0)], [grey(0, (2, 4))])


def test_pairs_need_as_many_of_both():
    for measure in (paired_similarity, drift):
        with pytest.raises(ValueError, match=r"\[1, 2\] and \[3, 2\]"):
            measure(at_angles(0), at_angles(0, 1, 2))
    with pytest.raises(ValueError, match="shorter"):
        pixel_drift([icon("red")], [])


# The features.


def test_features_are_those_of_transformers_own_call(clip_path, likeness, monkeypatch):
    monkeypatch.setattr(evaluate_likeness, "BATCH", 2)
    pictures = [icon("red", "RGB"), icon("blue", "RGB", (16, 40)), icon("green", "RGB", (64, 64))]
    texts = ["a red icon", "a icon", "a blue icon, " * 9]  # the last one is too long
    model = CLIPModel.from_pretrained(clip_path, dtype=torch.float32).eval()
    inputs = CLIPProcessor.from_pretrained(clip_path)(
        text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True, max_length=12
    )
    before = global_rng_state()
    seen, read = likeness.pictures(pictures), likeness.texts(texts)
    assert global_rng_state() == before
    with torch.no_grad():
        expected = model(**inputs)
    for found, own in ((seen, expected.image_embeds), (read, expected.text_embeds)):
        assert found.dtype == torch.float32 and found.shape == (3, 20)
        torch.testing.assert_close(found, own, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
        assert (found[0] - found[1]).norm() > 0.01  # they tell inputs apart


def test_transparent_icons_come_on_white(likeness):
    clear, palette = icon("red"), icon("red", "P")
    white = composite(clear, (255, 255, 255))
    black = composite(clear, (0, 0, 0))
    on_clear, on_white, on_black = likeness.pictures([clear, white, black])
    assert torch.equal(on_clear, on_white)
    assert not torch.allclose(on_clear, on_black, atol=1e-3)
    assert likeness.pictures([palette, icon("red", "L")]).shape == (2, 20)


# What isn't a CLIP.


def without(name):
    return lambda folder: (folder / name).unlink()


def junk(name, content=b"{junk"):
    return lambda folder: (folder / name).write_bytes(content)


def setting(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder; give the folder or the hub name of a CLIP"),
        (without("config.json"), "no config.json in it"),
        (without("model.safetensors"), "no weights in copy/; give one saved as safetensors"),
        (
            pickled,
            r"only pickled weights \(.bin\), which can run code in copy/; give one saved as safetensors",
        ),
        (setting(model_type="siglip"), "a siglip, not a CLIP"),
        (setting(model_type=None), "some model, not a CLIP"),
        (setting(projection_dim="x"), "cannot be loaded .*projection_dim"),
        (setting(projection_dim=8), "cannot be loaded"),
        (junk("config.json"), "cannot be loaded .*not a valid JSON"),
        (junk("config.json", b"[]"), "cannot be loaded"),
        (junk("model.safetensors"), "cannot be loaded .*header"),
        (junk("tokenizer.json"), "cannot be loaded"),
        (without("tokenizer.json"), "there is no vocabulary"),
        (without("processor_config.json"), "cannot be loaded .*image processor"),
    ],
)
def test_what_is_no_sound_clip_is_refused_in_one_line(clip_path, clean_copy, damage, message):
    folder = clean_copy(clip_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        Likeness(str(folder))
    assert str(refused.value).startswith(f"{folder}: ")
    assert "\n" not in str(refused.value)


def test_other_things_than_folders_of_clips_are_refused(clip_path, base_path):
    for name, message in (
        (str(clip_path / "model.safetensors"), "a single file"),
        (str(base_path), "no config.json"),
        (str(base_path / "text_encoder"), "a clip_text_model, not a CLIP"),
        ("nobody/nothing", "cannot be loaded"),  # of the hub, which isn't at hand
    ):
        with pytest.raises(UserError, match=message):
            Likeness(name)


def test_missing_weights_are_refused(clip_path, clean_copy):
    folder = clean_copy(clip_path)
    model = CLIPModel.from_pretrained(folder)
    tensors = model.state_dict()
    del tensors["visual_projection.weight"]
    model.save_pretrained(folder, state_dict=tensors)
    with pytest.raises(UserError, match=r"1 weights are missing from its files \(visual_projection"):
        Likeness(str(folder))


# Pictures that are drawn once.


@pytest.fixture
def pipeline(base_path):
    return load_pipeline(str(base_path))


@pytest.fixture
def drawings(monkeypatch) -> list:
    """The pictures that were denoised, batch by batch."""
    calls = []
    original = drawn.draw_batch

    def counted(pipeline, adapter, pictures, drawing, **settings):
        calls.append([(prompt, seed, adapter, settings["scale"]) for prompt, seed in pictures])
        return original(pipeline, adapter, pictures, drawing, **settings)

    monkeypatch.setattr(drawn, "draw_batch", counted)
    return calls


def make_drawer(pipeline, folder, adapters=None, drawing=DRAWING, batch_size=2, base="tiny") -> Drawer:
    return Drawer(pipeline, base, adapters or {}, drawing, folder / "drawn", batch_size=batch_size)


def pixels(pictures) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


@pytest.mark.slow
def test_pictures_are_those_of_draw_with_and_kept(pipeline, adapters, tmp_path, drawings):
    facts = {name: load_adapter(pipeline, name, adapters[name]) for name in ("LoRA", "Flat-LoRA")}
    drawer = make_drawer(pipeline, tmp_path, facts)
    methods = [(None, 1.0), ("LoRA", 1.0), ("LoRA", 0.5), ("Flat-LoRA", 1.0)]
    first = [pixels(drawer.draw(WANTED, *method)) for method in methods]
    assert [len(batch) for batch in drawings] == [2, 1] * len(methods)
    assert len({own for method in first for own in method}) == len(WANTED) * len(methods)
    expected = draw_with(pipeline, "LoRA", "a blue icon", 1, DRAWING, scale=0.5)
    assert first[2][1] == expected.tobytes()
    drawings.clear()
    again = make_drawer(pipeline, tmp_path, facts)
    assert [pixels(again.draw(WANTED, *method)) for method in methods] == first
    assert [pixels(drawer.draw(WANTED[::-1], *method))[::-1] for method in methods] == first
    assert not drawings


def test_an_interrupted_evaluation_goes_on_where_it_was(pipeline, tmp_path, drawings, monkeypatch):
    drawer = make_drawer(pipeline, tmp_path, batch_size=1)
    whole = pixels(drawer.draw(WANTED))
    drawings.clear()
    files = sorted((tmp_path / "drawn").rglob("*.png"), key=lambda file: file.stat().st_mtime_ns)
    files[1].write_bytes(files[1].read_bytes()[:60])  # not whole
    files[2].unlink()
    assert pixels(drawer.draw(WANTED)) == whole
    assert drawings == [[("a blue icon", 1, None, 1.0)], [("a green icon", 2, None, 1.0)]]
    assert len(list((tmp_path / "drawn").rglob("*"))) == 1 + len(WANTED)  # and their folder


@pytest.mark.parametrize(
    "change",
    [
        {"drawing": Drawing(16, 24, steps=2, guidance=1.0)},
        {"drawing": Drawing(16, 24, steps=1, guidance=2.0)},
        {"drawing": Drawing(16, 24, steps=1, guidance=1.0, sampler="DDIM")},
        {"base": "other/base"},
    ],
)
def test_other_settings_are_drawn_again(pipeline, tmp_path, drawings, change):
    make_drawer(pipeline, tmp_path).draw(WANTED[:1])
    make_drawer(pipeline, tmp_path, **change).draw(WANTED[:1])
    assert len(drawings) == 2


def test_another_adapter_file_under_the_same_name_is_drawn_again(pipeline, adapters, tmp_path, drawings):
    pictures = []
    for file in ("LoRA", "Flat-LoRA", "Flat-LoRA"):
        facts = {"mine": load_adapter(pipeline, "mine", adapters[file])}
        pictures += pixels(make_drawer(pipeline, tmp_path, facts).draw(WANTED[:1], "mine"))
        pipeline.delete_adapters("mine")
    assert len(drawings) == 2
    assert pictures[0] != pictures[1] == pictures[2]


def test_a_base_of_the_same_name_with_other_weights_is_drawn_again(pipeline, adapters, tmp_path, drawings):
    own = fingerprint(pipeline)
    facts = {"mine": load_adapter(pipeline, "mine", adapters["LoRA"])}
    assert fingerprint(pipeline) == own  # adapters don't count
    drawer = make_drawer(pipeline, tmp_path, facts)
    one = pixels(drawer.draw(WANTED[:1]))
    with torch.no_grad():
        pipeline.unet.conv_in.weight *= 1.5
    assert fingerprint(pipeline) != own
    assert pixels(make_drawer(pipeline, tmp_path, facts).draw(WANTED[:1])) != one
    assert len(drawings) == 2


def test_long_prompts_that_begin_alike_are_different_pictures(pipeline, tmp_path, drawings):
    prompts = [(f"a icon {'of a icon ' * 6} in {colour}", 0) for colour in ("red", "blue")]
    drawer = make_drawer(pipeline, tmp_path)
    for _ in range(2):
        drawer.draw(prompts)
    assert len(drawings) == 1


def test_a_folder_that_cannot_be_made_is_named(pipeline, tmp_path):
    (tmp_path / "drawn").write_text("a file")
    with pytest.raises(UserError, match="drawn/base: cannot be made"):
        make_drawer(pipeline, tmp_path).draw(WANTED)


# The report's part.


class Copies:
    """Draws nothing: gives the pictures that it is told to."""

    def __init__(self, pictures) -> None:
        self.pictures = pictures
        self.asked = []

    def draw(self, wanted, adapter=None, scale=1.0):
        self.asked.append((wanted, adapter, scale))
        return self.pictures[adapter]


@pytest.fixture
def samples(icons) -> list[Sample]:
    return find_samples(icons, "a icon")


def test_personalisation_of_perfect_pictures_and_of_copies(likeness, samples):
    heldout, training = samples[:2], samples[2:]
    truth, copies = ([Image.open(sample.path) for sample in part] for part in (heldout, training))
    drawer = Copies({None: truth, "copier": copies})
    personalisation = Personalisation(drawer, likeness, heldout, training)
    true, trained = likeness.pictures(truth), likeness.pictures(copies)
    cosines = true @ trained.T
    nearest = cosines.amax(dim=1).mean().item()
    assert personalisation.measure() == {
        "clip_i": pytest.approx(1, abs=1e-6),
        "nearest_training": {
            "drawn": pytest.approx(nearest, abs=1e-6),
            "true": pytest.approx(nearest, abs=1e-6),
        },
    }
    copied = personalisation.measure("copier", 0.5)
    assert copied["clip_i"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
    assert copied["nearest_training"]["drawn"] == pytest.approx(1, abs=1e-6)
    assert copied["nearest_training"]["true"] == pytest.approx(nearest, abs=1e-6)
    wanted = [("a blue icon", 0), ("a icon", 1)]  # by name: blue and green, of which the latter has none
    assert drawer.asked == [(wanted, None, 1.0), (wanted, "copier", 0.5)]
    assert cosines.max() < 0.999  # no two icons look alike to this CLIP


def test_retention_against_the_base(likeness):
    prompts = ["a red icon", "a blue icon"]
    base = [icon("red", "RGB"), icon("blue", "RGB")]
    other = [icon("red", "RGB"), icon("orange", "RGB")]
    drawer = Copies({None: base, "LoRA": other})
    retention = Retention(drawer, likeness, prompts)
    texts, own, changed = likeness.texts(prompts), likeness.pictures(base), likeness.pictures(other)
    cosine = torch.nn.functional.cosine_similarity
    assert retention.measure() == {
        "clip_t": pytest.approx(cosine(own, texts).mean().item(), abs=1e-6),
        "drift": 0,
        "pixel_drift": 0,
    }
    first, second = (np.asarray(part[1], dtype=float) / 255 for part in (base, other))
    assert retention.measure("LoRA", 0.5) == {
        "clip_t": pytest.approx(cosine(changed, texts).mean().item(), abs=1e-6),
        "drift": pytest.approx((1 - cosine(changed, own)).mean().item(), abs=1e-6),
        "pixel_drift": pytest.approx(np.abs(first - second).mean() / 2),
    }
    assert {tuple(wanted) for wanted, _, _ in drawer.asked} == {(("a red icon", 0), ("a blue icon", 1))}
    assert drawer.asked[-1][1:] == ("LoRA", 0.5)


def test_both_with_drawn_pictures(pipeline, adapters, samples, likeness, tmp_path, drawings):
    facts = {"LoRA": load_adapter(pipeline, "LoRA", adapters["LoRA"])}
    drawer = make_drawer(pipeline, tmp_path, facts)
    retention = Retention(drawer, likeness, ["a red icon"])
    personalisation = Personalisation(drawer, likeness, samples[:2], samples)
    assert retention.measure("LoRA")["pixel_drift"] > 0
    assert personalisation.measure("LoRA")["nearest_training"]["true"] == pytest.approx(1, abs=1e-6)
    assert [len(batch) for batch in drawings] == [1, 1, 2]  # the base's too, then the adapter's
    saved = next((tmp_path / "drawn" / "lora" / "scale-1.0").glob("a_red_icon-*-seed0.png"))
    (picture,) = drawer.draw([("a red icon", 0)], "LoRA")
    assert Image.open(io.BytesIO(saved.read_bytes())).tobytes() == picture.tobytes()
