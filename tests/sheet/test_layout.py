import itertools
import math

import pytest
from PIL import Image, ImageChops

from flatlora_diffusion.sheet import layout
from flatlora_diffusion.sheet.layout import _arranged, contact_sheet, sheet_size
from flatlora_diffusion.sheet.text import Text, fitted

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
    assert {(right - left, bottom - top) for row in boxes for left, top, right, bottom in row} == {(256, 256)}
    for upper, lower in zip(*boxes, strict=True):
        assert upper[0] == lower[0] and upper[3] < lower[1]
    for row in boxes:
        assert len({box[1] for box in row}) == 1
        assert row[0][2] < row[1][0] and row[1][2] < row[2][0]
    assert_empty_margin(sheet)


@pytest.mark.parametrize(
    ("side", "shown"),
    [(1, 256), (24, 240), (64, 256), (96, 192), (128, 256), (129, 129), (512, 512), (513, 512), (1024, 512)],
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


def test_references_stand_in_a_last_column_and_may_be_missing():
    cells = [colours("#010000", "#020000"), colours("#030000", "#040000"), colours("#050000", "#060000")]
    references = [Image.new("RGB", (1000, 1000), "#070000"), None, Image.new("RGB", (40, 20), "#080000")]
    plain = contact_sheet(cells, columns=["a", "b"], rows=["x", "y", "z"])
    sheet = contact_sheet(
        cells, columns=["a", "b"], rows=["x", "y", "z"], references=references, reference_label="real"
    )
    sizes = [[image.size for image in row] for row in cells]
    measured = sheet_size(
        sizes,
        columns=["a", "b"],
        rows=["x", "y", "z"],
        references=[image and image.size for image in references],
        reference_label="real",
    )
    assert measured == sheet.size and sheet.width > plain.width and sheet.height == plain.height
    for colour in ("#010000", "#040000", "#060000"):
        assert box_of(sheet, colour) == box_of(plain, colour)
    (left, top, right, bottom), filled = box_of(sheet, "#070000")  # reduced to what is drawn
    assert filled and (right - left, bottom - top) == (256, 256)
    assert (top, bottom) == (box_of(sheet, "#020000")[0][1], box_of(sheet, "#020000")[0][3])
    small, filled = box_of(sheet, "#080000")
    assert filled and (small[2] - small[0], small[3] - small[1]) == (240, 120)
    assert abs(small[0] + small[2] - left - right) <= 1 and left > box_of(sheet, "#020000")[0][2]
    assert_empty_margin(sheet)


def test_a_reference_has_a_heading_below_those_of_groups():
    layout = arranged(
        64, LABELS["groups of two"](4), ["x", "y"], references=[(9, 9), None], reference_label="real"
    )
    assert len(layout.places) == 2 * 4 + 1
    headings = {text.lines[0]: (x, y) for x, y, _, text in layout.texts if text.lines}
    assert headings["real"][1] == headings["seed 0"][1] and headings["real"][0] > headings["seed 1"][0]


# Groups, margins and sizes.


def arranged(side, columns, rows, **settings):
    """Where all of a sheet goes, without its pictures."""
    strip, references = settings.pop("strip", ()), settings.pop("references", ())
    cells = [[(side, side)] * len(columns)] * len(rows)
    return _arranged(cells, strip, references, columns=columns, rows=rows, **settings)


def text_boxes(layout):
    boxes = []
    for x, y, anchor, text in layout.texts:
        left = x - math.ceil(text.width / 2) if anchor == "m" else x
        boxes.append((left, y, left + text.width, y + text.height))
    return boxes


def picture_boxes(layout):
    return [(x, y, x + width, y + height) for x, y, (width, height) in layout.places]


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


LONG = ["Flat-LoRA" * 20, "a method with quite a long name " * 8, "LoRA"]
LABELS = {
    "short": lambda n: [f"method {i}" for i in range(n)],
    "long": lambda n: [f"{i} {LONG[i % 3]}" for i in range(n)],
    "groups of two": lambda n: [(f"{i // 2} {LONG[i // 2 % 3]}", f"seed {i % 2}") for i in range(n)],
    "groups of groups": lambda n: [
        (LONG[0], f"{i // 2} {PROMPTS[i // 2 % 5]}", LONG[i % 2]) for i in range(n)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell_size", "columns", "margin", "above", "beside"),
    [
        (8, 2, 0, "short", "groups of two"),
        (32, 1, None, "long", "groups of two"),
        (32, 5, 0, "short", "groups of groups"),
        (32, 12, None, "groups of two", "long"),
        (64, 2, 9, "groups of groups", "short"),
        (64, 12, 0, "long", "groups of two"),
        (192, 1, 0, "groups of two", "long"),
        (192, 2, None, "long", "groups of groups"),
        (192, 12, 9, "groups of groups", "groups of two"),
        (512, 1, 9, "groups of groups", "long"),
        (512, 5, None, "groups of two", "groups of groups"),
        (512, 12, 0, "short", "short"),
    ],
)
def test_nothing_overlaps_or_leaves_the_sheet(cell_size, columns, margin, above, beside):
    layout = arranged(
        64,
        LABELS[above](columns),
        LABELS[beside](4),
        cell_size=cell_size,
        margin=margin,
        strip=[(64, 64)] * 23,
        strip_label=LONG[1],
        title=LONG[0],
        footer=LONG[1],
    )
    texts, pictures = text_boxes(layout), picture_boxes(layout)
    assert len(pictures) == 4 * columns + 23
    width, height = layout.size
    boxes = [box for box in texts + pictures if box[0] < box[2] and box[1] < box[3]]
    for left, top, right, bottom in boxes:
        assert min(left, top, width - right, height - bottom) >= 12
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    wider = [(left - 3, top, right + 3, bottom) for left, top, right, bottom in texts if left < right]
    assert not [pair for pair in itertools.combinations(wider, 2) if overlap(*pair)], "they run together"
    rules = [(left, y, right + 1, y + 1) for left, right, y in layout.rules]
    assert not [pair for pair in itertools.product(boxes, rules) if overlap(*pair)]


@pytest.mark.parametrize("columns", [["Flat-LoRA"] * 3, [("Supercali", name) for name in "ab"]])
@pytest.mark.parametrize("margin", [None, 0, 50])
def test_columns_are_wide_enough_for_the_words_above_them(columns, margin):
    layout = arranged(8, columns, ["a"], cell_size=8, margin=margin)
    lines = [text.lines for *_, text in layout.texts]
    assert (
        all(len(text) == 1 for text in lines) and [columns[0] if len(columns) > 2 else "Supercali"] in lines
    )


def test_groups_have_their_label_once_and_in_their_middle():
    columns = [(f"seed {seed}", method) for seed in (0, 1) for method in METHODS]
    rows = [(prompt, f"seed {seed}") for prompt in ("a cat", "a dog") for seed in (3, 4)]
    layout = arranged(64, columns, rows)
    found = [(" ".join(text.lines), (x, y, text)) for x, y, _, text in layout.texts]
    words = [label for label, _ in found]
    assert sorted(words) == sorted(
        [*METHODS * 2, "seed 0", "seed 1", "a cat", "a dog", *["seed 3", "seed 4"] * 2]
    )
    places, pictures = dict(found), picture_boxes(layout)
    for index, seed in enumerate((0, 1)):
        first, last = pictures[3 * index], pictures[3 * index + 2]
        assert abs(2 * places[f"seed {seed}"][0] - (first[0] + last[2])) <= 1
        assert (first[0], last[2] - 1) in [(left, right) for left, right, _ in layout.rules]
    for index, prompt in enumerate(("a cat", "a dog")):
        first, last = pictures[12 * index], pictures[12 * index + 6]
        _, top, text = places[prompt]
        assert abs(2 * top + text.height - (first[1] + last[3])) <= 1
    between = [pictures[place + 1][0] - pictures[place][2] for place in range(5)]
    assert between[2] > between[0] == between[1] == between[3] == between[4]


def test_one_of_all_labels_may_stand_for_several_groups_further_in():
    layout = arranged(64, ["a"], [("cat", "x", "1"), ("cat", "y", "1"), ("dog", "y", "1")])
    words = [" ".join(text.lines) for *_, text in layout.texts]
    assert sorted(words) == sorted(["a", "cat", "dog", "x", "y", "y", "1", "1", "1"])
    # The rule between x and y begins beside the cat that both belong to; the one above the dog goes through.
    (inner, _, _), (outer, _, _) = layout.rules
    assert outer == layout.border < inner


@pytest.mark.parametrize("margin", [0, 1, 5, 40])
def test_the_margin_is_between_the_pictures(margin):
    names = [[f"#{row}{column}0000" for column in (1, 2, 3)] for row in (1, 2, 3)]
    rows = [("a", "b"), ("a", "c"), ("d", "e")]
    sheet = contact_sheet([colours(*row) for row in names], columns=list("xyz"), rows=rows, margin=margin)
    found = [[box_of(sheet, colour) for colour in row] for row in names]
    assert all(filled for row in found for _, filled in row)
    boxes = [[box for box, _ in row] for row in found]
    for row, column in itertools.product((0, 1, 2), (0, 1)):
        assert boxes[row][column + 1][0] - boxes[row][column][2] == margin
        assert boxes[column + 1][row][1] - boxes[column][row][3] == margin


@pytest.mark.parametrize("side", [16, 300])
def test_the_size_is_known_before_the_pictures_are(side):
    settings = {
        "columns": METHODS,
        "rows": [(PROMPTS[0], "seed 1"), (PROMPTS[2], "seed 2")],
        "title": "t",
        "footer": PROMPTS[2],
        "margin": 3,
    }
    cells = [colours("red", "green", "blue", side=side)] * 2
    strip = colours("red", "green", side=48)
    sheet = contact_sheet(cells, strip=strip, **settings)
    sizes = [[image.size for image in row] for row in cells]
    assert sheet_size(sizes, strip=[image.size for image in strip], **settings) == sheet.size


# Pixels.


def test_enlargement_is_crisp():
    pixels = Image.new("RGB", (64, 64))
    pixels.putdata([(x * 3 + 1, y * 3 + 1, (x * y) % 251) for y in range(64) for x in range(64)])
    corner, end = pixels.getpixel((0, 0)), pixels.getpixel((63, 63))
    sheet = contact_sheet([[pixels]], columns=["a"], rows=["b"])
    left, top = box_of(sheet, corner)[0][:2]
    right, bottom = box_of(sheet, end)[0][2:]
    shown = sheet.crop((left, top, right, bottom))
    assert ImageChops.difference(shown, pixels.resize((256, 256), Image.Resampling.NEAREST)).getbbox() is None


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
    assert filled and (box[2] - box[0], box[3] - box[1]) == (128, 128)
    surroundings = sheet.crop((box[0] - 64, box[1] - 64, box[2] + 64, box[1]))
    assert surroundings.getcolors() == [(256 * 64, (255, 255, 255))]


def test_half_transparent_pixels_are_mixed_with_white():
    sheet = contact_sheet([[picture((255, 0, 0, 51), mode="RGBA")]], columns=[""], rows=[""])
    assert box_of(sheet, (255, 204, 204))[1]


def test_the_pictures_given_are_not_changed():
    icon = picture((9, 8, 7, 6), mode="RGBA")
    before = icon.copy()
    contact_sheet([[icon]], columns=["a"], rows=["b"], strip=[icon])
    assert icon.mode == "RGBA" and icon.tobytes() == before.tobytes()


# Text.


@pytest.mark.slow
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
    shown = min(side, 512) if side > 128 else 256
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
    assert pixels[1, 0, 0] == columns * rows * 256**2
    assert pixels[0, 1, 0] == 23 * 64**2
    assert_empty_margin(sheet)


def test_lines_of_text_are_within_their_width_and_keep_all_words():
    for text in PROMPTS[:3]:
        wrapped = Text(text, 200, 14)
        assert " ".join(wrapped.lines).split() == text.split()
        assert wrapped.width <= 200
    broken = Text(PROMPTS[3], 200, 14)
    assert "".join(broken.lines) == PROMPTS[3] and broken.width <= 200


def test_labels_shrink_together_before_any_is_shortened():
    fits, shrunk = (fitted(["a cat", "some words " * n], 200, 150, 16) for n in (5, 18))
    assert [text.font.size for text in fits] == [16, 16]
    assert shrunk[0].font.size == shrunk[1].font.size < 16
    assert shrunk[1].height <= 150 and shrunk[1].lines[-1][-1] != "…"
    cut = fitted(["a cat", "some words " * 400], 200, 150, 16)[1]
    assert cut.font.size == 12 and cut.height <= 150 and cut.width <= 200
    assert cut.lines[-1].endswith("…")


def test_no_word_is_left_alone_on_a_line():
    (text,) = fitted(["a thing with a number, seed 0"], 180, 100, 14)
    lines = text.lines
    assert len(lines) == 2 and len(lines[1].split()) > 2


def test_signs_that_the_font_lacks_are_spelled_out():
    text = "Café \N{EM DASH} 8\N{MULTIPLICATION SIGN}8, \N{GREEK SMALL LETTER SIGMA} \N{RIGHTWARDS ARROW} 0"
    assert Text(text, 500, 14).lines == ["Cafe - 8x8, sigma -> 0"]


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
        ([[picture()] * 2] * 2, {"margin": -1}, "margin=-1 must be at least 0"),
        (
            [[picture()] * 2] * 2,
            {"rows": ["c", ("d", "e")]},
            "the row labels have different numbers of texts",
        ),
        ([[picture()] * 2] * 2, {"columns": [(), ()]}, "the column labels have different numbers of texts"),
        ([[picture()] * 2] * 2, {"strip": [picture(side=0)]}, "a picture has no pixels"),
        ([[picture()] * 2] * 2, {"references": [picture(side=0), None]}, "a picture has no pixels"),
        ([[picture()] * 2] * 2, {"references": [None]}, "1 references for 2 rows of pictures; pass one"),
    ],
)
def test_bad_input_is_named(cells, settings, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(cells, **{"columns": ["a", "b"], "rows": ["c", "d"], **settings})


def test_a_sheet_of_too_many_pixels_is_refused_before_it_is_drawn(monkeypatch):
    cells = [[picture()]]
    monkeypatch.setattr(layout.Image, "new", lambda *arguments: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"\d+ x \d+ pixels, more than the limit of 64 million; use fewer"):
        contact_sheet(cells, columns=["a"], rows=["b"], cell_size=9000)
