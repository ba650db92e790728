import json
import subprocess
import sys

import pytest
from PIL import Image, ImageChops

from flatlora_diffusion import contact_sheet as contact_sheet_module
from flatlora_diffusion import grid, typeset
from flatlora_diffusion.contact_sheet import contact_sheet
from flatlora_diffusion.grid import Sheet

METHODS = ["base", "LoRA", "Flat-LoRA"]
PROMPTS = [
    "an icon of a lighthouse in the style of sks, flat colours, thick outline\nseed 3",
    "a cat",
    "a prompt that never ends: " + "teapots, windmills and hot-air balloons, " * 60 + "\nseed 4711",
    "Supercalifragilisticexpialidocious" * 9,
    "",
]


def picture(colour="#336699", side=8, mode="RGB"):
    return Image.new(mode, (side, side), colour)


def colours(*values, side=8):
    return [picture(value, side) for value in values]


def box_of(sheet, colour):
    """Bounding box of the pixels of exactly this colour, and whether they fill it."""
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("RGB")
    channels = [channel.point(lambda value: 255 * (value == 0)) for channel in difference.split()]
    mask = ImageChops.darker(ImageChops.darker(*channels[:2]), channels[2])
    box = mask.getbbox()
    return box, mask.crop(box).getextrema() == (255, 255)


def assert_empty_margin(sheet, margin=12):
    width, height = sheet.size
    for box in (
        (0, 0, width, margin),
        (0, height - margin, width, height),
        (0, 0, margin, height),
        (width - margin, 0, width, height),
    ):
        assert sheet.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), (255, 255, 255))]


# Geometry.


def test_pictures_form_an_aligned_grid_in_the_order_given():
    names = [["#010000", "#020000", "#030000"], ["#040000", "#050000", "#060000"]]
    sheet = contact_sheet([colours(*row) for row in names], columns=METHODS, rows=["one", "two"])
    found = [[box_of(sheet, colour) for colour in row] for row in names]
    assert all(filled for row in found for _, filled in row)
    boxes = [[box for box, _ in row] for row in found]
    assert {(right - left, bottom - top) for row in boxes for left, top, right, bottom in row} == {(192, 192)}
    for upper, lower in zip(*boxes, strict=True):
        assert upper[0] == lower[0] and upper[3] < lower[1]
    for row in boxes:
        assert len({box[1] for box in row}) == 1
        assert row[0][2] < row[1][0] and row[1][2] < row[2][0]
    assert_empty_margin(sheet)


@pytest.mark.parametrize(
    ("side", "shown"),
    [(1, 192), (24, 192), (64, 192), (96, 192), (97, 97), (100, 100), (512, 512), (513, 512), (1024, 512)],
)
def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink(side, shown):
    sheet = contact_sheet([[picture("#102030", side)]], columns=["a"], rows=["b"])
    (left, top, right, bottom), filled = box_of(sheet, "#102030")
    assert filled and (right - left, bottom - top) == (shown, shown)


@pytest.mark.parametrize(("cell_size", "shown"), [(8, 8), (20, 16), (100, 96), (4, 4)])
def test_cell_size_bounds_the_pictures(cell_size, shown):
    sheet = contact_sheet([[picture("#102030")]], columns=["a"], rows=["b"], cell_size=cell_size)
    (left, top, right, bottom), filled = box_of(sheet, "#102030")
    assert filled and (right - left, bottom - top) == (shown, shown)


def test_pictures_of_different_shapes_keep_their_proportions_and_are_centred():
    wide, tall = Image.new("RGB", (600, 300), "#010000"), Image.new("RGB", (20, 80), "#020000")
    sheet = contact_sheet([[wide, tall]], columns=["a", "b"], rows=[""])
    first, second = box_of(sheet, "#010000")[0], box_of(sheet, "#020000")[0]
    assert (first[2] - first[0], first[3] - first[1]) == (512, 256)
    assert (second[2] - second[0], second[3] - second[1]) == (120, 480)
    assert abs((first[1] + first[3]) - (second[1] + second[3])) <= 1


# Pixels.


def test_enlargement_is_crisp():
    pixels = Image.new("RGB", (64, 64))
    pixels.putdata([(x * 3 + 1, y * 3 + 1, (x * y) % 251) for y in range(64) for x in range(64)])
    corner, end = pixels.getpixel((0, 0)), pixels.getpixel((63, 63))
    sheet = contact_sheet([[pixels]], columns=["a"], rows=["b"])
    left, top = box_of(sheet, corner)[0][:2]
    right, bottom = box_of(sheet, end)[0][2:]
    shown = sheet.crop((left, top, right, bottom))
    assert ImageChops.difference(shown, pixels.resize((192, 192), Image.Resampling.NEAREST)).getbbox() is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_transparent_pictures_lie_on_white(mode):
    icon = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (16, 16, 48, 48))
    if mode == "P":
        icon = Image.new("P", (64, 64), 1)
        icon.putpalette([0, 0, 0, 9, 9, 9])
        icon.paste(0, (16, 16, 48, 48))
        icon.info["transparency"] = 1
    elif mode.startswith("RGB "):
        icon = Image.new("RGB", (64, 64), "#123456")
        icon.paste("black", (16, 16, 48, 48))
        icon.info["transparency"] = (0x12, 0x34, 0x56)
    else:
        icon = icon.convert(mode)
    sheet = contact_sheet([[icon]], columns=[""], rows=[""])
    box, filled = box_of(sheet, "#000000")
    assert filled and (box[2] - box[0], box[3] - box[1]) == (96, 96)
    surroundings = sheet.crop((box[0] - 48, box[1] - 48, box[2] + 48, box[1]))
    assert surroundings.getcolors() == [(192 * 48, (255, 255, 255))]


def test_half_transparent_pixels_are_mixed_with_white():
    sheet = contact_sheet([[picture((255, 0, 0, 51), mode="RGBA")]], columns=[""], rows=[""])
    assert box_of(sheet, (255, 204, 204))[1]


def test_the_pictures_given_are_not_changed():
    icon = picture((9, 8, 7, 6), mode="RGBA")
    before = icon.copy()
    contact_sheet([[icon]], columns=["a"], rows=["b"], strip=[icon])
    assert icon.mode == "RGBA" and icon.tobytes() == before.tobytes()


# Text.


@pytest.mark.parametrize("side", [64, 300, 1024])
def test_no_text_leaves_the_sheet_or_touches_a_picture(side):
    names = [["#010000", "#020000", "#030000"]] * len(PROMPTS)
    arguments = {
        "columns": ["base", "a method with quite a long name " * 8, "Flat-LoRA" * 20],
        "rows": PROMPTS,
        "title": "A title that needs several lines " * 6,
        "strip": colours(*["#000100"] * 23, side=side),
        "strip_label": "Training icons " * 30,
        "footer": "one line\n" + "a line that must be wrapped " * 20,
    }
    cells = [colours(*row, side=side) for row in names]
    sheet = contact_sheet(cells, **arguments)
    assert_empty_margin(sheet)
    # Ink over a picture would leave fewer pixels of its colour than the picture has.
    shown = min(side, 512) if side > 96 else 192
    pixels = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 24)}
    for red in (1, 2, 3):
        assert pixels[red, 0, 0] == len(PROMPTS) * shown**2
    assert pixels[0, 1, 0] == 23 * (64 if side < 384 else 128) ** 2


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (10, 3), (3, 10)])
def test_any_shape_of_grid(columns, rows):
    sheet = contact_sheet(
        [colours(*["#010000"] * columns)] * rows,
        columns=[f"method {i}" for i in range(columns)],
        rows=[f"prompt {i}" for i in range(rows)],
        strip=colours(*["#000100"] * 23),
    )
    pixels = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 24)}
    assert pixels[1, 0, 0] == columns * rows * 192**2
    assert pixels[0, 1, 0] == 23 * 64**2
    assert_empty_margin(sheet)


def test_lines_of_text_are_within_their_width_and_keep_all_words():
    for text in PROMPTS[:3]:
        wrapped = typeset.Text(text, 200, 14)
        assert " ".join(wrapped.lines).split() == text.split()
        assert wrapped.width <= 200
    broken = typeset.Text(PROMPTS[3], 200, 14)
    assert "".join(broken.lines) == PROMPTS[3] and broken.width <= 200


def test_labels_shrink_together_before_any_is_shortened():
    fits, shrunk = (typeset.fitted(["a cat", "some words " * n], 200, 150, 16) for n in (5, 18))
    assert [text.font.size for text in fits] == [16, 16]
    assert shrunk[0].font.size == shrunk[1].font.size < 16
    assert shrunk[1].height <= 150 and shrunk[1].lines[-1][-1] != "…"
    cut = typeset.fitted(["a cat", "some words " * 400], 200, 150, 16)[1]
    assert cut.font.size == 12 and cut.height <= 150 and cut.width <= 200
    assert cut.lines[-1].endswith("…")


def test_no_word_is_left_alone_on_a_line():
    (text,) = typeset.fitted(["a thing with a number, seed 0"], 180, 100, 14)
    lines = text.lines
    assert len(lines) == 2 and len(lines[1].split()) > 2


def test_signs_that_the_font_lacks_are_spelled_out():
    text = "Café \N{EM DASH} 8\N{MULTIPLICATION SIGN}8, \N{GREEK SMALL LETTER SIGMA} \N{RIGHTWARDS ARROW} 0"
    assert typeset.Text(text, 500, 14).lines == ["Cafe - 8x8, sigma -> 0"]


def test_without_labels_there_is_no_label_column():
    cells = [[picture("#010000"), picture("#020000")]]
    bare = contact_sheet(cells, columns=["a", "b"], rows=[" "])
    labelled = contact_sheet(cells, columns=["a", "b"], rows=["a cat"])
    assert box_of(bare, "#010000")[0][0] < 40 < box_of(labelled, "#010000")[0][0]


def test_sheets_are_deterministic():
    arguments = {"columns": METHODS, "rows": PROMPTS[:1], "title": "t", "footer": "f"}
    cells = [colours("red", "green", "blue")]
    assert contact_sheet(cells, **arguments).tobytes() == contact_sheet(cells, **arguments).tobytes()


# Bad input.


@pytest.mark.parametrize(
    ("cells", "settings", "message"),
    [
        ([], {}, "there are no pictures"),
        ([[]], {"columns": []}, "there are no pictures"),
        ([[picture()] * 2, [picture()]], {}, r"row 2 has 1 pictures, but row 1 has 2; every row needs"),
        ([[picture()] * 3], {"rows": ["a"]}, "2 column labels for 3 columns of pictures; pass one label"),
        ([[picture()] * 2], {}, "2 row labels for 1 rows of pictures; pass one label"),
        ([[picture()] * 2] * 2, {"cell_size": 0}, "cell_size=0 must be at least 1"),
        ([[picture()] * 2] * 2, {"strip": [picture(side=0)]}, "a picture has no pixels"),
    ],
)
def test_bad_input_is_named(cells, settings, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(cells, **{"columns": ["a", "b"], "rows": ["c", "d"], **settings})


def test_a_sheet_of_too_many_pixels_is_refused_before_it_is_drawn(monkeypatch):
    monkeypatch.setattr(contact_sheet_module._Layout, "draw", lambda self: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"\d+ x \d+ pixels, more than the limit of 64 million; use fewer"):
        contact_sheet([[picture()]], columns=["a"], rows=["b"], cell_size=9000)


# Manifests and the command line.


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
    command = [sys.executable, "-m", "flatlora_diffusion.grid", *map(str, arguments)]
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
        == Sheet(columns=["base"], rows=[grid.SheetRow("a cat", [folder / "base-0.png"])]).draw().tobytes()
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

    assert grid.main([str(folder), "--output", str(two)]) == 0
    assert Image.open(two).tobytes() == Sheet.load(folder).draw().tobytes()
    assert not list(folder.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base-0.png", "missing.png", "--columns", "a", "b"], "missing.png does not exist"),
        (["base-0.png", "broken.png", "--columns", "a", "b"], "broken.png cannot be read"),
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
    try:
        code = grid.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert sorted(folder.iterdir()) == before
    assert (folder / "sheet.png").read_text() == "an earlier one"


def test_an_error_through_the_module(tmp_path):
    failed = command_line("x.png", "--columns", "a", "--output", tmp_path / "sheet.png")
    assert (failed.returncode, failed.stderr) == (2, "error: the picture x.png does not exist\n")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        grid.main(["--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "manifest" in shown and "--columns" in shown
