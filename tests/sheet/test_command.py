import json
import subprocess
import sys

import pytest
from PIL import Image

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.sheet.command import main
from flatlora_diffusion.sheet.files import Sheet, SheetRow
from flatlora_diffusion.sheet.layout import contact_sheet
from tests.sheet.test_layout import METHODS, box_of, picture


@pytest.fixture
def folder(tmp_path):
    """A folder as the generation step leaves it: 2 prompts, 3 methods."""
    images = [[f"{method}-{seed}.png" for method in METHODS] for seed in (0, 1)]
    for index, name in enumerate(name for row in images for name in row):
        picture((index + 1, 0, 0)).save(tmp_path / name)
    (tmp_path / "icons").mkdir()
    for index in range(3):
        picture((0, index + 1, 0)).save(tmp_path / "icons" / f"{index}.png")
    manifest = {
        "columns": METHODS,
        "rows": [{"label": f"a cat, seed {i}", "images": row} for i, row in enumerate(images)],
        "title": "Cats",
        "footer": "rank 4",
        "strip": ["icons/0.png", str(tmp_path / "icons" / "1.png")],
        "strip_label": "icons",
        "settings": {"steps": 30},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def command_line(*arguments):
    command = [sys.executable, "-m", "flatlora_diffusion.sheet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_manifest_is_drawn_like_the_same_pictures_from_python(folder):
    sheet = Sheet.load(folder)
    assert Sheet.load(folder / "manifest.json") == sheet
    cells = [[Image.open(folder / f"{method}-{seed}.png") for method in METHODS] for seed in (0, 1)]
    expected = contact_sheet(
        cells,
        columns=METHODS,
        rows=["a cat, seed 0", "a cat, seed 1"],
        title="Cats",
        strip=[Image.open(folder / "icons" / f"{i}.png") for i in (0, 1)],
        strip_label="icons",
        footer="rank 4",
    )
    assert sheet.draw().tobytes() == expected.tobytes()


def test_a_manifest_needs_only_columns_and_rows(folder):
    (folder / "manifest.json").write_text(
        json.dumps({"columns": ["base"], "rows": [{"label": "a cat", "images": ["base-0.png"]}]})
    )
    assert (
        Sheet.load(folder).draw().tobytes()
        == Sheet(columns=["base"], rows=[SheetRow("a cat", [folder / "base-0.png"])]).draw().tobytes()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json is not valid JSON"),
        ("[]", "holds a list; it must be a JSON object"),
        ("{}", "rows must be a list"),
        ('{"rows": [1]}', "rows must be a list"),
        ('{"rows": [{"images": "a.png"}]}', r"rows\[0\]\.images='a.png' must be a list of strings"),
        ('{"rows": [{"label": 3, "images": []}]}', r"rows\[0\]\.label=3 must be a string"),
        ('{"rows": [], "columns": [1]}', r"columns=\[1\] must be a list of strings"),
        ('{"rows": [], "strip": {}}', r"strip=\{\} must be a list of strings"),
    ],
)
def test_bad_manifests_are_named(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Sheet.load(tmp_path)


def test_command_line_with_pictures_and_with_a_folder(folder):
    images = [folder / f"{method}-{seed}.png" for seed in (0, 1) for method in METHODS]
    one, two = folder / "one.png", folder / "two.png"
    done = command_line(
        *images, "--columns", *METHODS, "--rows", "a", "b", "--title", "T", "--strip", folder / "icons",
        "--output", one,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    sheet = Image.open(one).convert("RGB")
    boxes = [box_of(sheet, (index + 1, 0, 0))[0] for index in range(6)]
    assert boxes[0][1] == boxes[2][1] < boxes[3][1] and boxes[0][0] < boxes[1][0]
    assert all(box_of(sheet, (0, index + 1, 0))[1] for index in range(3))

    main([str(folder), "--output", str(two)])
    assert Image.open(two).tobytes() == Sheet.load(folder).draw().tobytes()
    assert not list(folder.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["base-0.png", "missing.png", "--columns", "a", "b"],
            "missing.png: cannot be read as an image (No such file",
        ),
        (
            ["base-0.png", "broken.png", "--columns", "a", "b"],
            "broken.png: cannot be read as an image",
        ),
        (["base-0.png", "--columns", "a", "b"], "1 pictures do not fill rows of 2 columns"),
        (["base-0.png", "--columns", "a", "--rows", "b", "c"], "--rows has 2 labels for 1 rows"),
        (["base-0.png"], "--columns is missing"),
        (["icons"], "manifest.json (No such file or directory)"),
        ([".", "--columns", "a"], "leave --columns and --rows out"),
        (["base-0.png", "--columns", "a", "--strip", "empty"], "the folder empty holds no pictures"),
        (["--columns", "a"], "the following arguments are required: IMAGE"),
        ([".", "--output", "sheet.jpg"], "--output sheet.jpg must end in .png"),
        ([".", "--output", "nowhere/sheet.png"], "the folder nowhere of --output does not exist"),
    ],
)
def test_command_line_errors_are_one_line_and_write_nothing(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "broken.png").write_bytes((folder / "base-0.png").read_bytes()[:40])
    (folder / "empty").mkdir()
    (folder / "sheet.png").write_text("an earlier one")
    before = sorted(folder.iterdir())
    arguments = arguments if "--output" in arguments else [*arguments, "--output", "sheet.png"]
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert sorted(folder.iterdir()) == before
    assert (folder / "sheet.png").read_text() == "an earlier one"


def test_an_error_through_the_module(tmp_path):
    failed = command_line("x.png", "--columns", "a", "--output", tmp_path / "sheet.png")
    assert (failed.returncode, failed.stderr) == (
        2,
        "error: x.png: cannot be read as an image (No such file or directory); mend or remove it\n",
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "manifest" in shown and "--columns" in shown
