"""The command `flatlora-captions`: what it writes, where, and what it says of captions."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data.caption_command import main
from flatlora_diffusion.data.caption_files import name_in_words, with_trigger
from flatlora_diffusion.data.folders import read_folder


def captions(folder: Path) -> dict[str, str | None]:
    return {picture.path.name: picture.caption for picture in read_folder(folder).pictures}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of tiny pictures with these names."""

    def make(*names: str) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for index, name in enumerate(names):
            Image.new("RGBA", (16, 16), (40 * index, 200, 90, 128)).save(folder / name)
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("birthday_cake.png", "birthday cake"),
        ("red-apple-02.png", "red apple"),
        ("fox (3).png", "fox"),
        ("fox2.webp", "fox"),
        ("007.png", "007"),
        ("smiling.face+hat.png", "smiling face hat"),
        ("__.png", ""),
    ],
)
def test_names_in_words(name, words):
    assert name_in_words(Path(name)) == words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a fox", "sks, a fox"),
        ("a fox in SKS style", "a fox in SKS style"),
        ("sks, a fox", "sks, a fox"),
        ("asksb fox", "sks, asksb fox"),
        ("{instance_prompt} of a fox", "{instance_prompt} of a fox"),
    ],
)
def test_a_trigger_is_added_once_where_no_word_is_it(caption, expected):
    assert with_trigger(caption, "sks") == with_trigger(with_trigger(caption, "sks"), "sks") == expected


@pytest.mark.slow
def test_without_flags_it_says_what_is_wrong_and_writes_nothing(pictures, capsys):
    folder = pictures("a.png", "b.png", "c.png", "d.png")
    long = "red " + "fox " * 99
    for name, caption in (("a", "a  Fox"), ("c", "a fox"), ("d", long)):
        (folder / f"{name}.txt").write_text(caption)
    before = content(folder)
    main([str(folder)])
    assert content(folder) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "without a caption: b.png"
    assert lines[1].startswith('cut: d.png: "red fox') and "--caption_chunks 2 reads all" in lines[1]
    assert lines[2:] == [
        'repeated: c.png: "a fox", as a.png has',
        "4 images: 1 without a caption, 1 cut, 1 repeated",
    ]
    main([str(folder), "--caption_chunks", "2"])
    assert "0 cut" in capsys.readouterr().out


@pytest.mark.slow
def test_a_template_writes_txt_files_and_keeps_what_is_there(pictures, capsys):
    folder = pictures("red_fox.png", "owl_2.png", "cat.png")
    (folder / "cat.txt").write_text("my cat")
    words = [str(folder), "--template", "{instance_prompt}: a {style} icon of {{{name}}}", "--style", "3d"]
    main(words)
    assert "wrote 2 captions in .txt files" in capsys.readouterr().out
    expected = {
        "red_fox.png": "{instance_prompt}: a 3d icon of {red fox}",
        "owl_2.png": "{instance_prompt}: a 3d icon of {owl}",
        "cat.png": "my cat",
    }
    assert captions(folder) == expected
    main([*words, "--trigger", "sks"])
    assert "added the trigger to 1 caption in .txt files" in capsys.readouterr().out
    assert captions(folder) == expected | {"cat.png": "sks, my cat"}


def test_metadata_is_kept_in_its_form(pictures):
    folder = pictures("a.png", "b.png", "c.png", "d.png")
    lines = [{"file_name": "a.png", "prompt": "a föx", "score": 2}, {"file_name": "b.png", "prompt": ""}]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "d.caption").write_text("by hand")
    own = ["--caption_column", "prompt"]
    main([str(folder), *own, "--template", "{name}", "--trigger", "sks"])
    assert [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "a.png", "prompt": "sks, a föx", "score": 2},
        {"file_name": "b.png", "prompt": "sks, b"},
        {"file_name": "c.png", "prompt": "sks, c"},
    ]
    assert (folder / "d.caption").read_text() == "sks, by hand\n"
    assert not list(folder.glob("*.txt"))


def test_a_table_and_folders_of_kohya(pictures):
    folder = pictures("a.png")
    below = folder / "3_owl"
    below.mkdir()
    for name in ("x.png", "y.png"):
        Image.new("RGB", (8, 8)).save(below / name)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "text", "by"], ["a.png", "a, b", "me"], ["3_owl/x.png", "x", ""]]
        )
    main([str(folder), "--kohya_folders", "--trigger", "sks"])
    with (folder / "metadata.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [["a.png", "sks, a, b", "me"], ["3_owl/x.png", "sks, x", ""]]
    assert (below / "y.txt").read_text() == "sks, owl\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "a {styl}"], "{styl} isn't one of {name}, {style}, {caption}, {instance_prompt}"),
        (["--template", "a {name"], "--template a {name: expected '}'.*; write {{ and }} for braces"),
        (["--template", "{name!r}"], "{name} isn't one of"),
        (["--template", "a {style}"], "{style} and --style go together"),
        (["--template", "{name}", "--style", "3d"], "{style} and --style go together"),
        (["--template", "{caption}"], "{caption} and --model go together"),
        (["--template", " "], "--template is empty"),
        (["--style", "3d"], "--style is for --template"),
        (["--trigger", ""], "--trigger is empty"),
        (["--caption_chunks", "0"], "--caption_chunks 0: must be greater than 0"),
        (["--model", "./gone"], "--model ./gone: no such folder"),
        (["--base", "./gone"], "--base ./gone: no such folder"),
        (["--templat", "x"], "did you mean --template"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(pictures, words, message):
    folder = pictures("a.png")
    before = content(folder)
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as refused:
        main([str(folder), *words])
    assert "\n" not in str(refused.value) and content(folder) == before


@pytest.mark.slow
def test_folders_without_sound_pictures_and_files_that_two_would_share_are_named(pictures, tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        main([str(tmp_path / "gone")])
    folder = pictures("fox 1.png", "fox 1.webp", "FOX.png")
    main([str(folder), "--template", "a {name}"])  # they have one caption, so they can share it
    assert captions(folder)["fox 1.webp"] == "a fox"
    (folder / "fox 1.txt").unlink()
    (folder / "broken.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image"):
        main([str(folder), "--template", "a {name}"])
    assert not (folder / "fox 1.txt").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image in it"):
        main([str(tmp_path / "empty")])


@pytest.fixture
def blip(tmp_path) -> Path:
    """A tiny BLIP with random weights."""
    words = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"), *"abcdefghij"]
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {
        **tower,
        **ids,
        "vocab_size": len(words),
        "max_position_embeddings": 64,
        "encoder_hidden_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
        )
    folder = tmp_path / "blip"
    model.save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), additional_special_tokens=["[DEC]"])
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def test_a_model_describes_the_pictures_that_lack_a_caption(blip, pictures, capsys):
    folder = pictures("a.png", "b.png")
    (folder / "a.txt").write_text("by hand")
    words = [str(folder), "--model", str(blip), "--device", "cpu", "--template", "icon: {caption}"]
    main(words)
    first = captions(folder)
    assert first["a.png"] == "by hand"
    said = first["b.png"].removeprefix("icon: ").split()
    assert said and set(said) <= {*"abcdefghij", "[UNK]"}
    assert "wrote 1 caption in .txt files" in capsys.readouterr().out
    (folder / "b.txt").unlink()
    main(words)
    assert captions(folder) == first


@pytest.mark.slow
def test_other_models_are_refused(clip_path, pictures):
    with pytest.raises(UserError, match=f"--model {clip_path}: cannot be loaded"):
        main([str(pictures("a.png")), "--model", str(clip_path), "--device", "cpu"])
