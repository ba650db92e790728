"""What the page opens with, what it shows beside it, and what it says of a difference."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.app.comparison import MOST_KEPT, Asked, Comparison, Shelf
from flatlora_diffusion.app.difference_text import difference_text, same_text, scale_html
from flatlora_diffusion.app.engine import Job, Studio
from flatlora_diffusion.app.first import FOLDER, FirstComparison
from flatlora_diffusion.app.frames import Frames
from flatlora_diffusion.app.presets import presets
from flatlora_diffusion.app.references import Example, References
from flatlora_diffusion.app.serve import PROJECT
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.draw.difference import difference
from flatlora_diffusion.draw.pipeline import Drawing, load_pipeline
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.output.reading import find_runs

DRAWING = Drawing(16, 16, 2, 3.0, None, "default")
ASKED = Asked("a icon", 0, DRAWING, 1.0)


@pytest.fixture
def site(base_path, adapters):
    studio = Studio(load_pipeline(str(base_path)), "tiny", adapters)
    return Site(studio, {"Unseen": ["a icon"]}, steps=2, guidance=3.0)


def begun(site):
    first = FirstComparison(site)
    first.find()
    assert first.coming
    first.begin()
    for _ in range(600):
        if not first.coming:
            return first
        time.sleep(0.05)
    raise AssertionError("it was not drawn")


def test_it_is_drawn_once_and_again_when_something_changes(site, adapters):
    drawn = begun(site).ready
    assert drawn.asked == ASKED and list(drawn.files) == ["base", "LoRA", "Flat-LoRA"]
    place = adapters["Flat-LoRA"].parent / FOLDER
    assert len(list(place.iterdir())) == 7
    kept = FirstComparison(site)
    kept.find()
    assert kept.ready.asked == ASKED and not kept.coming
    assert kept.ready.seconds == drawn.seconds and kept.ready.archive.is_file()
    for method, file in kept.ready.files.items():
        assert file.read_bytes() == drawn.files[method].read_bytes()
        assert place not in file.parents  # what is beside the adapter isn't lent to visitors
    # Another base, and what is half there: it is drawn anew.
    first, fingerprint = FirstComparison(site), site.studio.fingerprint
    site.studio.fingerprint = "another base"
    assert first._read(ASKED) is None
    site.studio.fingerprint = fingerprint
    assert first._read(ASKED)
    (place / "lora-seed0.png").unlink()
    assert first._read(ASKED) is None
    (place / "comparison.json").write_text(json.dumps({"key": 3}))
    assert first._read(ASKED) is None
    shutil.rmtree(place)
    assert first._read(ASKED) is None
    assert first._key(ASKED) != first._key(dataclasses.replace(ASKED, prompt="another icon"))


def test_a_folder_that_cannot_be_written_is_no_hindrance(site, adapters):
    (adapters["Flat-LoRA"].parent / FOLDER).write_text("a file where the folder would be")
    assert begun(site).ready.asked == ASKED


def test_a_large_base_on_a_cpu_is_not_drawn_unasked(site, monkeypatch):
    monkeypatch.setattr(Site, "draws_fast", False)
    first = FirstComparison(site)
    first.find()
    first.begin()
    assert first.ready is None and not first.coming


def test_a_comparison_has_a_link_and_a_shelf_a_limit(tmp_path):
    link = Asked("a b&c", 7, DRAWING, 0.5).link("LoRA", BASE)
    assert link == (
        "?prompt=a+b%26c&negative_prompt=&seed=7&steps=2&guidance=3&scale=0.5&sampler=default"
        "&width=16&height=16&left=LoRA&right=base"
    )

    def comparison(number, lent=True):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.png").touch()
        return Comparison(ASKED, {BASE: folder / "a.png"}, {BASE: 1.0}, folder / "a.zip", lent)

    shelf = Shelf((comparison("first", lent=False),))
    for number in range(MOST_KEPT + 1):
        shelf = shelf.with_new(comparison(number))
    assert len(shelf.kept) == MOST_KEPT and shelf.current is shelf.kept[0]
    assert {folder.name for folder in tmp_path.iterdir()} == {"first", *map(str, range(1, MOST_KEPT + 1))}
    assert shelf.showing(2).current is shelf.kept[2]
    shelf.forget()
    assert [folder.name for folder in tmp_path.iterdir()] == ["first"]  # everybody's
    assert Shelf().current is None


def test_frames_are_remembered_by_all_that_makes_them(monkeypatch):
    frames, picture = Frames(), Image.new("RGB", (16, 16))
    job = Job("LoRA", [("a", 1), ("a", 2)], DRAWING, 0.5)
    frames.keep(job, [picture, picture])
    assert len(frames.of(job)) == 2 and frames.of(job)[0] is not picture
    assert frames.of(Job("LoRA", [("a", 2)], DRAWING, 0.5))
    for other in (
        dataclasses.replace(job, method="Flat-LoRA"),
        dataclasses.replace(job, scale=1.0),
        dataclasses.replace(job, pictures=[("a", 3)]),
        dataclasses.replace(job, drawing=dataclasses.replace(DRAWING, steps=3)),
    ):
        assert not frames.of(other)
    frames.keep(Job(BASE, [("a", 1)], DRAWING, 0.5), [picture])
    assert frames.of(Job(BASE, [("a", 1)], DRAWING, 2.0))  # a scale is nothing to the base
    monkeypatch.setattr("flatlora_diffusion.app.frames._MOST_BYTES", 3 * 16 * 16)
    frames.keep(Job(BASE, [("a", 9)], DRAWING), [picture])
    assert not frames.of(job) and frames.of(Job(BASE, [("a", 9)], DRAWING))


def test_presets_and_true_pictures_are_those_of_the_run():
    runs = find_runs(PROJECT / "assets" / "adapters")
    references = References.of_runs(runs)
    assert len(references.trained) == 23 and len(references.heldout) == 64
    found = presets({}, references)
    unseen, seen, known = found
    assert (unseen, seen) == ("Subjects it was never shown", "Subjects among the icons")
    assert known == "Styles known before: are they still drawn?"
    captions = {example.caption for example in references.heldout}
    assert len(found[unseen]) == 4 and set(found[unseen]) < captions
    told, example = references.truth(f" {found[unseen][0]} ")
    assert told == "The true picture, never trained" and example.file.parent.name == "icons-3d-heldout"
    assert references.truth(found[seen][0])[0] == "The true picture, trained"
    assert references.truth("a noto icon of tomato") is None
    strip = references.strip()
    assert strip.count("<img") == 23 and "these 23 icons:" in strip and str(PROJECT) not in strip


def test_where_the_images_are_gone_prompts_of_the_style_come_first():
    prompts = ["a noto icon of cat", "a 3d icon of cat"]
    found = References(prompts=prompts, subject="a 3d icon").presets()
    assert list(found) == ["Prompts of validation", "Styles known before: are they still drawn?"]


def test_captions_that_several_pictures_have_name_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    same = [Example("an icon", tmp_path / "a.png"), Example("an icon", tmp_path / "b.png")]
    references = References(trained=same)
    assert references.truth("an icon") is None and references.presets() == {}
    assert References().strip() == "" and References().presets() == {}
    assert "<p>" not in References(heldout=same).strip()


@pytest.mark.parametrize(
    ("grey", "told"),
    [
        (0, "are the same, pixel for pixel"),
        (1, "are all but the same"),
        (5, "differ a little"),
        (15, "differ clearly"),
        (40, "differ strongly"),
        (200, "have little in common"),
    ],
)
def test_a_difference_has_words(grey, told):
    black, other = (Image.new("RGB", (8, 8), (value,) * 3) for value in (0, grey))
    text = difference_text("LoRA", "<b>", difference(black, other))
    assert f"LoRA and &lt;b&gt; {told}." in text and f"{grey / 2.55:.1f}% of the full range" in text


def test_one_method_or_one_file_on_both_sides_is_no_difference():
    assert "Both sides are LoRA" in same_text("LoRA", "LoRA")
    assert "the same file under two names" in same_text("LoRA", "mine")
    assert 'left: 50.0%">25' not in scale_html() and 'left: 44.7%">20%' in scale_html()


def test_paths_of_a_run_are_found_from_above_its_folder(tmp_path, monkeypatch):
    from flatlora_diffusion.output.reading import _image_folders

    (tmp_path / "project" / "icons").mkdir(parents=True)
    run = tmp_path / "project" / "out" / "lora"
    run.mkdir(parents=True)
    settings = {"instance_data_dir": "icons", "heldout_data_dir": "gone"}
    assert _image_folders(run, settings) == {"instance_data_dir": tmp_path / "project" / "icons"}
    absolute = {"heldout_data_dir": str(tmp_path / "project")}
    assert _image_folders(run, absolute) == {"heldout_data_dir": Path(tmp_path / "project")}
