"""Hugging Face datasets: the same images and captions as in a folder, and one line for whatever is wrong."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.datasets import DatasetSource, dataset_captions, dataset_samples
from flatlora_diffusion.data.images import EmbeddedImage, Framing, Sample, variants
from flatlora_diffusion.grid.flags import grid_parser
from flatlora_diffusion.grid.request import read_recipe
from flatlora_diffusion.train.arms import train
from tests.tiny import assert_equal, global_rng_state, run, stop_after

NAMES = ("blue.png", "green.png", "orange.png", "red.png")
CAPTIONS = ("a blue icon", None, "  ", "{instance_prompt} in red")


@pytest.fixture
def config(config, icons, tmp_path) -> TrainConfig:
    """Training on a dataset that isn't written yet."""
    return dataclasses.replace(
        config,
        instance_data_dir=None,
        dataset_name=str(tmp_path / "set"),
        max_train_steps=4,
        cache_dir=str(tmp_path / "cache"),
        caption_column="words",
    )


@pytest.fixture
def source(tmp_path) -> DatasetSource:
    """A dataset that isn't written yet."""
    return DatasetSource(str(tmp_path / "set"), cache=str(tmp_path / "cache"), caption_column="words")


def write_parquet(folder, splits=("train",), column="image", captions=CAPTIONS, contents=None, icons=None):
    """The icons in parquet files, one for each split."""
    if contents is None:
        contents = [(icons / name).read_bytes() for name in NAMES]
    features = datasets.Features(
        {
            "number": datasets.Value("int64"),
            column: datasets.Image(),
            "words": datasets.Value("string"),
            "list": datasets.List(datasets.Value("string")),
        }
    )
    rows = {
        "number": list(range(len(contents))),
        column: [content and {"bytes": content, "path": None} for content in contents],
        "words": list(captions),
        "list": [["a", "b"]] * len(contents),
    }
    folder.mkdir(exist_ok=True)
    for split in splits:
        file = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(file)
    return folder


def write_image_folder(folder, kind, icons):
    folder.mkdir()
    for name in NAMES:
        shutil.copy(icons / name, folder)
    lines = zip(NAMES, CAPTIONS, strict=True)
    if kind == "jsonl":
        text = "".join(json.dumps({"file_name": name, "words": words}) + "\n" for name, words in lines)
    else:
        text = "file_name,words\n" + "".join(f"{name},{words or ''}\n" for name, words in lines)
    (folder / f"metadata.{kind}").write_text(text)


def write(kind, folder, icons):
    if kind == "parquet":
        write_parquet(folder, icons=icons)
    else:
        write_image_folder(folder, kind, icons)


# Reading.


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_rows_have_the_files_and_captions_of_the_images(source, icons, kind):
    write(kind, Path(source.name), icons)
    before = global_rng_state()
    samples = dataset_samples(source, "train", "a icon")
    assert global_rng_state() == before
    assert [sample.path.read_bytes() for sample in samples] == [(icons / name).read_bytes() for name in NAMES]
    assert [sample.caption for sample in samples] == ["a blue icon", "a icon", "a icon", "a icon in red"]
    assert [sample.path.name for sample in samples] == [f"row-{number:05d}" for number in range(4)]


def test_without_a_caption_column_all_captions_are_the_instance_prompt(source, icons):
    """As in the diffusers script, even where there is a column that might be meant."""
    write_parquet(Path(source.name), icons=icons)
    samples = dataset_samples(dataclasses.replace(source, caption_column=None), "train", "a icon")
    assert {sample.caption for sample in samples} == {"a icon"}


def test_columns_splits_and_configurations_by_name(source, icons):
    folder = Path(source.name)
    for name, captions in (("flat", "abcd"), ("round", "efgh")):
        (folder / name).mkdir(parents=True)
        write_parquet(folder / name, ("train", "validation"), "picture", captions, icons=icons)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: flat\n  data_dir: flat\n- config_name: round\n  data_dir: round\n---\n"
    )
    chosen = dataclasses.replace(source, configuration="round", image_column="picture")
    for split in ("train", "validation"):
        assert [sample.caption for sample in dataset_samples(chosen, split, "a icon")] == list("efgh")
    with pytest.raises(UserError, match=r"cannot be loaded \(Config name is missing.*\['flat', 'round'\]"):
        dataset_samples(dataclasses.replace(chosen, configuration=None), "train", "a icon")


def test_what_is_converted_goes_into_the_cache_folder(source, icons, tmp_path):
    write_parquet(Path(source.name), icons=icons)
    dataset_samples(source, "train", "a icon")
    assert list((tmp_path / "cache").rglob("*.arrow"))


def show(image, **settings):
    framing = Framing(**{"resolution": 16, "center_crop": True, "random_flip": True} | settings)
    return list(variants(Sample(image, "a"), framing, seed=0))


@pytest.mark.parametrize("background", [(10, 20, 30), None])
def test_images_are_shown_as_from_files(tmp_path, background):
    """Turned upright, composited, resized, cropped, mirrored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.linear_gradient("L").resize((60, 20))
    Image.merge("RGBA", [picture, picture.rotate(180), picture, picture]).save(tmp_path / "a.png", exif=exif)
    embedded = EmbeddedImage("a.png", "row 0", (tmp_path / "a.png").read_bytes)
    for settings in ({}, {"center_crop": False}, {"resolution": 32, "aspect_buckets": True}):
        shown = show(embedded, background=background, **settings)
        for one, other in zip(
            shown, show(tmp_path / "a.png", background=background, **settings), strict=True
        ):
            assert torch.equal(one.pixels, other.pixels)
            assert one.original_size == other.original_size == (60, 20)
            assert one.crop_top_left == other.crop_top_left


# Training.


@pytest.fixture
def icons_as_in_the_dataset(icons):
    """The folder of icons with the captions of the dataset."""
    (icons / "metadata.jsonl").unlink()
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (icons / name).with_suffix(".txt").write_text(caption or "")
    return icons


@pytest.mark.slow
def test_a_run_ends_in_the_same_adapter_as_one_on_a_folder(config, icons_as_in_the_dataset, tmp_path):
    icons = icons_as_in_the_dataset
    write_parquet(Path(config.dataset_name), icons=icons)
    folder = run(config, dataset_name=None, instance_data_dir=str(icons), output_dir=str(tmp_path / "folder"))
    assert_equal(run(config), folder)


@pytest.mark.slow
def test_a_held_out_split_is_measured_like_a_held_out_folder(config, icons_as_in_the_dataset, tmp_path):
    icons = icons_as_in_the_dataset
    write_parquet(Path(config.dataset_name), ("validation",), icons=icons)
    write_parquet(Path(config.dataset_name), ("train",), **three(png()))
    config = dataclasses.replace(config, max_train_steps=2, heldout_steps=1)

    def losses(name, **changes):
        run(config, output_dir=str(tmp_path / name), **changes)
        return json.loads((tmp_path / name / "summary.json").read_text())["heldout_losses"]

    of_split = losses("split", heldout_split="validation")
    assert list(of_split) == ["1", "2"]
    assert of_split == losses("folder", heldout_data_dir=str(icons))


@pytest.mark.slow
def test_it_resumes_wherever_the_dataset_is_and_refuses_another(config, icons, tmp_path):
    folder = Path(config.dataset_name)
    write_parquet(folder, icons=icons)
    whole = run(config)
    parts = str(tmp_path / "parts")
    stop_after(config, 2, output_dir=parts)
    moved = dataclasses.replace(
        config,
        output_dir=parts,
        resume_from_checkpoint="latest",
        dataset_name=str(folder.rename(tmp_path / "x")),
    )
    write_parquet(folder, captions="abcd", icons=icons)
    with pytest.raises(UserError, match="belongs to other settings"):
        train(dataclasses.replace(moved, dataset_name=str(folder)))
    assert_equal(run(moved), whole)


def test_captions_alone_are_those_of_the_rows(config, icons, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_parquet(Path(config.dataset_name), icons=icons)
    assert dataset_captions(str(folder), "words") == ["a blue icon", "", "", "{instance_prompt} in red"]
    words = ["--base", "b", "--dataset_name", str(folder), "--caption_column", "words"]
    given = vars(grid_parser().parse_all([*words, "--instance_prompt", "x"]))
    assert read_recipe(given).grid.prompts == ("a blue icon", "x", "x in red")
    for column, message in (
        ("wrods", r"--caption_column wrods: no such column in .*words"),
        ("list", r"row 0 of train, counted from 0: --caption_column list holds a list, not text"),
    ):
        with pytest.raises(UserError, match=message):
            dataset_captions(str(folder), column)


@pytest.mark.slow
def test_the_comparison_shows_the_first_images(config, icons, monkeypatch):
    monkeypatch.setattr("flatlora_diffusion.train.afterwards.MOST_IN_STRIP", 3)
    write_parquet(Path(config.dataset_name), icons=icons)
    settings = {"validation_inference_steps": 1, "num_validation_images": 1, "max_train_steps": 1}
    train(dataclasses.replace(config, compare=True, **settings))
    folder = Path(config.output_dir) / "comparison"
    strip = json.loads((folder / "manifest.json").read_text())["strip"]
    for name, icon in zip(strip, NAMES[:3], strict=True):
        white = Image.new("RGBA", (24, 24), "white")
        expected = Image.alpha_composite(white, Image.open(icons / icon).convert("RGBA")).convert("RGB")
        assert Image.open(folder / name).convert("RGB").tobytes() == expected.tobytes()
    assert (Path(config.output_dir) / "comparison.png").is_file()


# What can be wrong.


def png(**settings):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG", **settings)
    return buffer.getvalue()


def three(bad):
    return {"contents": [png(), png(), bad], "captions": "abc"}


def write_script(folder):
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(folder / 'run')!r}, 'w')")


def write_saved(folder):
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(folder)


def write_text(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("no image")


def write_broken(name, content):
    def write(folder):
        write_parquet(folder, **three(png()))
        (folder / name).write_bytes(content)

    return write


def write_files(folder):
    """Rows that name a file which isn't there."""
    rows = {"image": [{"bytes": None, "path": "gone.png"}], "words": ["a"]}
    features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
    folder.mkdir()
    pyarrow.parquet.write_table(
        datasets.Dataset.from_dict(rows, features).data.table, folder / "train.parquet"
    )


def parquet(**settings):
    return lambda folder: write_parquet(folder, **{**three(png()), **settings})


# Name -> what the dataset is, settings, what the error must say.
BAD = {
    "no folder": (lambda folder: None, {}, "set: cannot be loaded (Couldn't find any data file"),
    "no network": (
        lambda folder: None,
        {"dataset_name": "some/set"},
        "some/set: cannot be loaded (Couldn't reach",
    ),
    "empty folder": (lambda folder: folder.mkdir(), {}, "doesn't contain any data files"),
    "a name too long": (
        lambda folder: None,
        {"dataset_name": "x" * 300},
        "File name too long",
    ),
    "a script": (write_script, {}, "cannot be loaded (Dataset scripts are no longer supported"),
    "saved by save_to_disk": (write_saved, {}, "save_to_disk"),
    "parquet that is none": (
        write_broken("train-00000-of-00001.parquet", b"junk"),
        {},
        "set: cannot be loaded (",
    ),
    "README that is none": (
        write_broken("README.md", b"---\nconfigs: [\n---\n"),
        {},
        "set: cannot be loaded (",
    ),
    "no such configuration": (parquet(), {"dataset_config_name": "x"}, "BuilderConfig 'x' not found"),
    "no train split": (
        parquet(splits=("test", "validation")),
        {},
        "no split train in it (there: validation, test)",
    ),
    "no held-out split": (parquet(), {"heldout_split": "test"}, "set: no split test in it (there: train)"),
    "no image column": (parquet(column="picture"), {}, "--image_column image: no such column in"),
    "no caption column": (
        parquet(),
        {"caption_column": "text"},
        "set (there: number, image, words, list)",
    ),
    "another kind of image column": (
        parquet(column="picture"),
        {"image_column": "words"},
        "--image_column words: holds Value('string'), not images (columns of images: picture)",
    ),
    "text alone": (write_text, {"image_column": "text", "caption_column": None}, "(columns of images: none)"),
    "captions that are lists": (
        parquet(),
        {"caption_column": "list"},
        "row 0 of train, counted from 0: --caption_column list holds a list, not text",
    ),
    "junk": (
        parquet(**three(b"junk")),
        {},
        "row 2 of train, counted from 0: cannot be read as an image (of no known",
    ),
    "truncated": (
        parquet(**three(png()[:60])),
        {},
        "row 2 of train, counted from 0: cannot be read as an image (",
    ),
    "a row without image": (parquet(**three(None)), {}, "row 2 of train, counted from 0: there is no image"),
    "a file that isn't there": (
        write_files,
        {},
        "row 0 of train, counted from 0: cannot be read as an image (",
    ),
}


@pytest.mark.parametrize(
    ("make", "settings", "fragment"), [pytest.param(*case, id=name) for name, case in BAD.items()]
)
def test_bad_datasets(config, tmp_path, monkeypatch, capfd, caplog, make, settings, fragment):
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    make(Path(config.dataset_name))
    config = dataclasses.replace(config, **settings)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train(config))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert lines[-1].startswith("error: --")
    assert fragment in lines[-1]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("datasets.")]
    assert len(lines) == 1 and not told, "nothing else was worth saying"
    assert not Path(config.output_dir).exists()
    assert not (tmp_path / "set" / "run").exists(), "a dataset's code ran"


def test_an_empty_split_is_refused(config, monkeypatch):
    """Whatever the version: some load it, some don't."""
    features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "words": []}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": empty})
    with pytest.raises(UserError, match="set: no image in its split train"):
        train(config)


def test_a_missing_package_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--dataset_name needs the package datasets: pip install datasets"):
        train(config)


def test_versions_that_run_a_datasets_code_are_refused(config, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(
        UserError, match=r"datasets 3\.6\.0 can run code of a dataset; 4\.0 or newer is needed"
    ):
        train(config)


def test_the_log_says_how_many_images_and_captions_there_are(source, tmp_path, icons, caplog):
    write_parquet(tmp_path / "set", icons=icons)
    caplog.set_level("INFO")
    dataset_samples(source, "train", "an icon")
    dataset_samples(dataclasses.replace(source, caption_column=None), "train", "an icon")
    flag = f"--dataset_name {source.name}"
    assert caplog.messages == [
        f"{flag}, train: 4 images, 2 with captions (2 from its column words), 2 without",
        f"{flag}: no --caption_column, so the instance prompt is every caption",
        f"{flag}, train: 4 images, 0 with captions, 4 without",
    ]
