"""What of a folder is read (pictures, captions, sub-folders), and what is told of it."""

import csv
import json
import logging
import os
import shutil

import pytest
import torch
from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import has_picture_name
from flatlora_diffusion.data import images
from flatlora_diffusion.data.folders import read_folder
from flatlora_diffusion.data.images import Framing, find_samples, variants
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.sdxl.encoding import Latents

PROMPT = "an icon"


def save_image(path, colour="red", kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path, kind)
    return path


def write_table(folder, *rows, columns=("file_name", "text")):
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])


def captions_of(folder, **settings):
    samples = find_samples(folder, PROMPT, **settings)
    return {str(sample.path.relative_to(folder)): sample.caption for sample in samples}


def told(caplog, folder, **settings):
    """The lines that the log has of a folder."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        find_samples(folder, PROMPT, "--data", **settings)
    return caplog.messages


# Pictures.


@pytest.mark.parametrize(
    "suffix",
    [
        *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
        *(".jp2", ".tga", ".ppm", ".sgi", ".PNG", ".Avif"),
    ],
)
def test_whatever_pillow_opens_is_a_picture(tmp_path, suffix):
    save_image(tmp_path / f"a{suffix}")
    assert captions_of(tmp_path) == {f"a{suffix}": PROMPT}


@pytest.mark.parametrize("suffix", [".pdf", ".eps", ".ps", ".mpg", ".wmf", ".h5", ".txt", ".svg", ""])
def test_documents_and_films_are_no_pictures(tmp_path, suffix):
    assert not has_picture_name(tmp_path / f"a{suffix}")


def test_pictures_by_another_name_are_named(tmp_path, caplog):
    save_image(tmp_path / "a.png")
    for name in ("b", "c.dat", "d.heic"):
        save_image(tmp_path / name, kind="WEBP")
    for name in (".DS_Store", "Thumbs.db", ".hidden", "model.safetensors", "notes.md"):
        (tmp_path / name).write_bytes(b"junk, not a picture")
    (tmp_path / "book.pdf").write_bytes(b"%PDF-1.4")
    assert told(caplog, tmp_path) == [
        "--data: 1 image, 0 with captions, 1 without",
        "passed over: b, c.dat (a picture (WEBP) by its content; rename it so that its suffix says so); "
        "book.pdf (a format that isn't read); d.heic (pip install pillow-heif reads it)",
    ]


def test_a_folder_with_nothing_but_what_is_passed_over_says_so(tmp_path):
    save_image(tmp_path / "more" / "a.png")
    with pytest.raises(UserError) as error:
        find_samples(tmp_path, PROMPT, "--data")
    assert str(error.value) == "--data: no image in it; passed over: more/: 1 (sub-folder with pictures)"


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(tmp_path):
    """Bytes of another encoding in the name of a picture: it has a digest and variants as any other."""
    save_image(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    (sample,) = find_samples(tmp_path, PROMPT)
    assert os.fsencode(sample.path.name) == b"caf\xe9.png"
    assert len(images.digest([sample])) == 64
    assert len(list(variants(sample, Framing(resolution=4), seed=0))) == 4


# Captions.


def test_the_first_caption_counts_and_the_others_are_named(tmp_path, caplog):
    for name in ("a", "b", "c", "d", "e"):
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from jsonl"}))
    write_table(tmp_path, ("a.png", "from csv"), ("b.png", "from csv, with a comma"))
    for name in ("b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"from {name}.txt\n")
    for name in ("c", "d"):
        (tmp_path / f"{name}.caption").write_text(f"from {name}.caption\n")
    (tmp_path / "gone.caption").write_text("of a picture that was removed")
    assert captions_of(tmp_path) == {
        "a.png": "from jsonl",
        "b.png": "from csv, with a comma",
        "c.png": "from c.txt",
        "d.png": "from d.caption",
        "e.png": PROMPT,
    }
    summary, passed_over = told(caplog, tmp_path)
    assert summary.startswith("--data: 5 images, 4 with captions (1 from metadata.")
    for source in (
        "1 from metadata.jsonl",
        "1 from metadata.csv",
        "1 from .txt files",
        "1 from .caption files",
    ):
        assert source in summary
    assert summary.endswith("), 1 without")
    for part in (
        "metadata.csv (captions are from metadata.jsonl)",
        "b.txt (captions are from metadata.csv)",
        "c.caption (captions are from .txt files)",
        "gone.caption (no picture beside it)",
    ):
        assert part in passed_over


def test_suffixes_in_capitals(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.PNG")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.Caption").write_text("two")
    assert captions_of(tmp_path) == {"a.PNG": "one", "b.PNG": "two"}


def test_an_empty_caption_leaves_the_next_one(tmp_path):
    save_image(tmp_path / "a.png")
    write_table(tmp_path, ("a.png", " "))
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "a.caption").write_text("a fox")
    assert captions_of(tmp_path) == {"a.png": "a fox"}


def test_another_column_of_the_table(tmp_path):
    save_image(tmp_path / "more" / "a.png")
    write_table(tmp_path, ("more/a.png", "no", 'a "fox",\nred'), columns=("file_name", "text", "words"))
    assert captions_of(tmp_path, caption_key="words") == {"more/a.png": 'a "fox",\nred'}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("file_name,words\na.png,a fox\n", "line 2: must be of columns file_name and text (its columns: "),
        (
            "a.png;a fox\na.png;a fox\n",
            "line 2: must be of columns file_name and text (its columns: a.png;a fox)",
        ),
        ("file_name,text\n\nb.png,a fox\n", "line 3: there is no image b.png beside it"),
        ("file_name,text\na.png\n", "line 2: file_name and text must both be strings"),
        ("file_name,text\na.png,\xe9\n", "cannot be read as UTF-8 text"),
    ],
)
def test_a_bad_line_of_the_table_is_named(tmp_path, content, problem):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        find_samples(tmp_path, PROMPT)
    assert str(error.value).startswith(str(tmp_path / "metadata.csv"))
    assert problem in str(error.value)


def test_half_a_character_in_a_caption_is_refused(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a \\ud83d fox"}')
    with pytest.raises(UserError, match=r"line 1: the caption .* isn't text in Unicode"):
        find_samples(tmp_path, PROMPT)


# Sub-folders.


def kohya_layout(folder):
    save_image(folder / "10_sks fox" / "a.png")
    save_image(folder / "10_sks fox" / "b.png")
    (folder / "10_sks fox" / "b.caption").write_text("a fox that sits")
    save_image(folder / "2_wolf_cub" / "a.png", "blue")
    save_image(folder / "0_not" / "a.png")
    save_image(folder / "sketches" / "deep" / "a.png")
    save_image(folder / ".cache" / "a.png")
    save_image(folder / "z.png")


def test_folders_as_for_kohya_are_named(tmp_path, caplog):
    kohya_layout(tmp_path)
    assert told(caplog, tmp_path) == [
        "--data: 1 image, 0 with captions, 1 without",
        "passed over: 0_not/: 1, sketches/: 1 (sub-folder with pictures); 10_sks fox/: 2, 2_wolf_cub/: 1 "
        "(sub-folder in kohya's layout, which --kohya_folders reads)",
    ]


def test_folders_as_for_kohya_are_read(tmp_path, caplog):
    kohya_layout(tmp_path)
    samples = find_samples(tmp_path, PROMPT, kohya_folders=True)
    assert [(str(s.path.relative_to(tmp_path)), s.caption, s.repeats) for s in samples] == [
        ("10_sks fox/a.png", "sks fox", 10),
        ("10_sks fox/b.png", "a fox that sits", 10),
        ("2_wolf_cub/a.png", "wolf_cub", 2),
        ("z.png", PROMPT, 1),
    ]
    summary, passed_over = told(caplog, tmp_path, kohya_folders=True)
    assert "4 images (10_sks fox/: 2 x 10, 2_wolf_cub/: 1 x 2), 3 with captions (" in summary
    assert "2 from the folder's name" in summary
    assert passed_over == "passed over: 0_not/: 1, sketches/: 1 (sub-folder with pictures)"


def test_metadata_above_goes_before_what_a_folder_has(tmp_path):
    kohya_layout(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "2_wolf_cub/a.png", "text": "a cub"}))
    (picture,) = [
        p for p in read_folder(tmp_path, kohya_folders=True).pictures if p.path.parent.name == "2_wolf_cub"
    ]
    assert (picture.caption, picture.source, picture.repeats) == ("a cub", "metadata.jsonl", 2)


def test_repeats_decide_the_digest(tmp_path):
    save_image(tmp_path / "10_fox" / "a.png")
    first = images.digest(find_samples(tmp_path, PROMPT, kohya_folders=True))
    shutil.move(tmp_path / "10_fox", tmp_path / "11_fox")
    assert images.digest(find_samples(tmp_path, PROMPT, kohya_folders=True)) != first


def test_an_epoch_sees_an_image_as_often_as_its_folder_says(tmp_path):
    kohya_layout(tmp_path)
    samples = find_samples(tmp_path, PROMPT, kohya_folders=True)
    encoded = []

    def encode(pixels):
        encoded.append(pixels)
        return Latents(pixels[:, :1, :1, :1].clone(), torch.zeros(1, 1, 1, 1))

    cache = LatentCache(samples, encode, Framing(resolution=8, center_crop=True), seed=0, noise_levels=10)
    assert len(encoded) == len(samples), "each is encoded once"
    for epoch in range(2):
        captions = cache.batch(range(epoch * 23, (epoch + 1) * 23)).captions
        counts = {caption: captions.count(caption) for caption in captions}
        assert counts == {"sks fox": 10, "a fox that sits": 10, "wolf_cub": 2, PROMPT: 1}
