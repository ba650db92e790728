"""Icon folders, captions, transparency, crops, flips, and the stream of samples made of them."""

import collections
import hashlib
import io
import json
import math
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.common.seeds import keyed_generator
from flatlora_diffusion.data import images, latents
from flatlora_diffusion.data.images import (
    Framing,
    Sample,
    composite,
    find_samples,
    parse_background,
    sample_index,
)
from flatlora_diffusion.data.latents import LatentCache, PromptCache
from flatlora_diffusion.sdxl.encoding import Latents, encode_prompts
from tests.tiny import build_text_encoders, build_tokenizer, global_rng_state

PROMPT = "an icon"


def save_image(path, size=(8, 6), colour="red"):
    Image.new("RGB", size, colour).save(path)
    return path


def noise_image(size, mode="RGB", seed=0):
    width, height = size
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write_metadata(folder, *entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def captions_of(folder, prompt=PROMPT):
    return {sample.path.name: sample.caption for sample in find_samples(folder, prompt)}


# Captions.


def test_captions_come_from_metadata_then_sidecars_then_the_prompt(tmp_path):
    for name in ("both", "metadata", "neither", "sidecar", "empty"):
        save_image(tmp_path / f"{name}.png")
    write_metadata(
        tmp_path,
        {"file_name": "both.png", "text": "from metadata", "other": 1},
        {"file_name": "metadata.png", "text": " from metadata too\n"},
        {"file_name": "empty.png", "text": "  "},
    )
    (tmp_path / "both.txt").write_text("from the sidecar")
    (tmp_path / "sidecar.txt").write_text("\n from the sidecar  \n")
    (tmp_path / "empty.txt").write_text("from the sidecar, as metadata is empty")
    assert captions_of(tmp_path) == {
        "both.png": "from metadata",
        "empty.png": "from the sidecar, as metadata is empty",
        "metadata.png": "from metadata too",
        "neither.png": PROMPT,
        "sidecar.png": "from the sidecar",
    }


def test_samples_come_by_name(tmp_path):
    for name in ("c.png", "a.png", "B.png", "b.jpg"):
        save_image(tmp_path / name)
    write_metadata(tmp_path, {"file_name": "b.jpg", "text": "listed first"})
    assert list(captions_of(tmp_path)) == ["B.png", "a.png", "b.jpg", "c.png"]


def test_the_placeholder_stands_for_the_instance_prompt(tmp_path):
    for name in ("a", "b", "c"):
        save_image(tmp_path / f"{name}.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "{instance_prompt}, a fox"})
    (tmp_path / "b.txt").write_text("a wolf, {instance_prompt}, {instance_prompt} {other}")
    assert captions_of(tmp_path, "flat icon {x}") == {
        "a.png": "flat icon {x}, a fox",
        "b.png": "a wolf, flat icon {x}, flat icon {x} {other}",
        "c.png": "flat icon {x}",
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_in_any_script_with_and_without_a_byte_order_mark(tmp_path, encoding):
    caption = "狐のアイコン, лиса"
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(caption, encoding=encoding)
    line = json.dumps({"file_name": "b.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line, encoding=encoding)
    assert captions_of(tmp_path) == {"a.png": caption, "b.png": caption}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_lines_of_metadata_end_at_newlines_alone(tmp_path, separator):
    """JSON text may hold Unicode's own line separators unescaped."""
    save_image(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": f"a{separator}b"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}\r\n\n", encoding="utf-8")
    assert captions_of(tmp_path) == {"a.png": f"a{separator}b"}


def test_metadata_may_name_images_in_folders_below(tmp_path):
    (tmp_path / "more").mkdir()
    save_image(tmp_path / "more" / "a.png")
    save_image(tmp_path / "more" / "unlisted.png")
    write_metadata(tmp_path, {"file_name": "more/a.png", "text": "a fox"})
    assert captions_of(tmp_path) == {"a.png": "a fox"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "a.png", "text": ', "must be"),
        ('{"file_name": "a.png"}', "must be"),
        ('{"text": "a fox"}', "must be"),
        ('["a.png", "a fox"]', "must be"),
        ('"a.png"', "must be"),
        ("a.png: a fox", "must be"),
        ('{"file_name": "a.png", "text": 7}', "must both be strings"),
        ('{"file_name": ["a.png"], "text": "a fox"}', "must both be strings"),
        ('{"file_name": "b.png", "text": "a fox"}', "there is no image b.png"),
        ('{"file_name": "", "text": "a fox"}', "there is no image"),
        ('{"file_name": "/a.png", "text": "a fox"}', "there is no image /a.png"),
    ],
)
def test_a_bad_line_of_metadata_is_named_by_its_number(tmp_path, line, problem):
    save_image(tmp_path / "a.png")
    good = '{"file_name": "a.png", "text": "a fox"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        find_samples(tmp_path, PROMPT)
    assert str(error.value).startswith(f"{tmp_path / 'metadata.jsonl'}, line 3: ")
    assert problem in str(error.value)


def test_captions_may_have_another_key_in_metadata(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.png")
    fox = {"file_name": "a.png", "words": "a fox", "text": "something else"}
    write_metadata(tmp_path, fox)
    samples = find_samples(tmp_path, PROMPT, caption_key="words")
    assert [sample.caption for sample in samples] == ["a fox", PROMPT]
    write_metadata(tmp_path, fox, {"file_name": "b.png", "text": "a wolf"})
    with pytest.raises(UserError) as error:
        find_samples(tmp_path, PROMPT, caption_key="words")
    assert str(error.value) == (
        f"{tmp_path / 'metadata.jsonl'}, line 2: must be "
        '{"file_name": "...", "words": "..."} (its keys: file_name, text)'
    )


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_captions_that_are_no_text_are_named(tmp_path, name):
    save_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"\xff\xfe caption")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text") as error:
        find_samples(tmp_path, PROMPT)
    assert str(tmp_path / name) in str(error.value)


# The folder.


def test_junk_is_passed_over(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "B.JPEG")
    for name in (".DS_Store", "notes.txt", "icon.svg", "._a.png", ".hidden.png", "Thumbs.db", "a.png.bak"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 not an image")
    for name in (".cache", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"not an image")
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert list(captions_of(tmp_path)) == ["B.JPEG", "a.png"]


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="no image in it") as error:
        find_samples(tmp_path, PROMPT)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("name", "problem"), [("none", "no such folder"), ("a.png", "not a folder")])
def test_a_folder_that_is_none(tmp_path, name, problem):
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=problem) as error:
        find_samples(tmp_path / name, PROMPT)
    assert str(tmp_path / name) in str(error.value)


def image_bytes(kind):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    settings = {} if kind in ("gif", "bmp", "tiff") else {"exif": orientation}
    buffer = io.BytesIO()
    noise_image((12, 10), "L" if kind == "gif" else "RGB").save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File", "ignore:Image size")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
def test_any_damage_to_an_image_is_survived_or_named(tmp_path, monkeypatch, kind):
    """Decoders raise all sorts of errors; whatever the damage, there is an image or an error with a name."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a damaged size shall not cost memory
    draw, whole, path = random.Random(kind), image_bytes(kind), tmp_path / f"icon.{kind}"
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(draw.choice([60, len(whole)]))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice([len(whole), len(whole), draw.randrange(len(whole))])])
        try:
            composite(open_image(path), (0, 0, 0))
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
    assert refused > 10, "some of this must have been beyond repair"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_truncated_image_is_an_error(tmp_path, kind):
    save_image(tmp_path / "sound.png")
    content = image_bytes(kind)
    (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        find_samples(tmp_path, PROMPT)
    assert f"cut.{kind}" in str(error.value)


def test_the_digest_is_that_of_names_captions_and_contents(tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)

    def digest():
        return images.digest(find_samples(tmp_path, PROMPT))

    first = digest()
    (tmp_path / "notes.txt").write_text("junk")
    assert digest() == first
    seen = {first}
    (tmp_path / "a.txt").write_text("a caption")
    seen.add(digest())
    save_image(tmp_path / "b.png", colour="blue")
    seen.add(digest())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    seen.add(digest())
    assert len(seen) == 4


# Pixels.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """The eight orientations, against the definition: the pixel that the camera says is the top left one."""
    image = noise_image((5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    stored = np.asarray(image)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), upright)


def test_original_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image((40, 20)).save(tmp_path / "a.png", exif=exif)
    shown = show(tmp_path / "a.png", 16)[0]
    assert shown.original_size == (40, 20)


BACKGROUNDS = [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#12aB9f", (0x12, 0xAB, 0x9F))]


def over(colour, alpha, background):
    """The compositing equation in exact arithmetic: colour * alpha + background * (1 - alpha)."""
    return colour * (alpha / 255) + np.array(background) * (1 - alpha / 255)


@pytest.mark.parametrize(("name", "background"), BACKGROUNDS)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_the_background(tmp_path, mode, name, background):
    image = noise_image((64, 64), mode)
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image).astype(float)
    expected = over(pixels[..., :-1], pixels[..., -1:], background)
    actual = np.asarray(composite(open_image(tmp_path / "a.png"), parse_background(name)))
    assert actual.shape == (64, 64, 3)
    assert np.abs(actual - expected).max() <= 1, "8 bits round"
    opaque, clear = pixels[..., -1] == 255, pixels[..., -1] == 0
    assert opaque.any()
    assert clear.any()
    assert np.array_equal(actual[opaque], np.broadcast_to(pixels[..., :-1], actual.shape)[opaque])
    assert (actual[clear] == background).all()


@pytest.mark.parametrize(("name", "background"), BACKGROUNDS)
def test_palettes_with_one_clear_entry_and_with_an_alpha_each(tmp_path, name, background):
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    image = Image.new("P", (3, 1))
    image.putpalette(palette)
    image.putdata([0, 1, 2])
    for transparency, alphas in [(1, [255, 0, 255]), (bytes([0, 128, 255]), [0, 128, 255])]:
        image.save(tmp_path / "a.png", transparency=transparency)
        actual = np.asarray(composite(open_image(tmp_path / "a.png"), background))[0]
        expected = over(np.reshape(palette, (3, 3)).astype(float), np.array(alphas)[:, None], background)
        assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize(("mode", "clear"), [("L", 7), ("RGB", (7, 8, 9)), ("1", 0)])
def test_a_colour_that_a_png_declares_transparent(tmp_path, mode, clear):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), 1 if mode == "1" else tuple(np.add(clear, 1)) if mode == "RGB" else 8)
    image.save(tmp_path / "a.png", transparency=clear)
    actual = composite(open_image(tmp_path / "a.png"), (1, 2, 3))
    assert actual.getpixel((0, 0)) == (1, 2, 3)
    assert actual.getpixel((1, 0)) == image.convert("RGB").getpixel((1, 0))


def test_an_opaque_image_keeps_its_pixels(tmp_path):
    image = noise_image((9, 7))
    image.save(tmp_path / "a.png")
    for background in ((0, 0, 0), (255, 255, 255)):
        assert composite(open_image(tmp_path / "a.png"), background).tobytes() == image.tobytes()


def test_sixteen_bits_a_pixel_keep_their_tones(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0..255, each scaled to 16 bits
    Image.fromarray(values).save(tmp_path / "a.png")
    actual = np.asarray(composite(open_image(tmp_path / "a.png"), (255, 255, 255)))
    expected = np.repeat(values[..., None] // 257, 3, axis=2)
    assert np.abs(actual.astype(int) - expected).max() <= 1


def test_sixteen_bits_have_the_tones_that_they_had_before(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    before = Image.open(tmp_path / "a.png").point(lambda value: value / 256, "L").convert("RGB")
    assert composite(open_image(tmp_path / "a.png"), (255, 255, 255)).tobytes() == before.tobytes()


def deep_files(folder):
    """The same ramp of 256 tones, as formats of other depths have it."""
    tones = np.arange(256).reshape(16, 16)
    Image.fromarray((tones / 255).astype(np.float32)).save(folder / "float.tiff")
    Image.fromarray((tones * 257).astype(np.uint16)).save(folder / "little.tiff")
    (folder / "big.pgm").write_bytes(b"P5 16 16 65535\n" + (tones * 257).astype(">u2").tobytes())
    (folder / "scanline.pfm").write_bytes(b"Pf\n16 16\n-1.0\n" + (tones[::-1] / 255).astype("<f4").tobytes())
    Image.frombytes("I;16B", (16, 16), (tones * 257).astype(">u2").tobytes()).save(folder / "large.tiff")
    return np.repeat(tones[..., None], 3, axis=2)


@pytest.mark.parametrize("name", ["float.tiff", "little.tiff", "big.pgm", "scanline.pfm", "large.tiff"])
def test_deep_pictures_keep_their_tones(tmp_path, name):
    expected = deep_files(tmp_path)
    assert np.array_equal(np.asarray(composite(open_image(tmp_path / name), (9, 9, 9))), expected)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.full((4, 4), 70000, np.int32), "32-bit integers"),
        (np.full((4, 4), 128, np.float32), "floats from 128 to 128, not from 0 to 1"),
        (np.full((4, 4), -0.5, np.float32), "floats from -0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
    ],
)
def test_deep_pictures_whose_white_is_not_known_are_refused(tmp_path, values, problem):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=problem) as error:
        open_image(tmp_path / "a.tiff")
    assert str(tmp_path / "a.tiff") in str(error.value)
    assert "8 or 16 bits" in str(error.value)


def test_the_transparent_tone_of_a_deep_picture(tmp_path):
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=65535)
    actual = composite(open_image(tmp_path / "a.png"), (1, 2, 3))
    assert [actual.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (1, 2, 3)]


def exif_that_cannot_be_written(orientation):
    """An orientation, and a field whose negative number Pillow reads and refuses to write."""
    fields = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), (0x013E, 9, 1, struct.pack("<i", -3))]
    body = b"".join(struct.pack("<HHI", *head) + value for *head, value in fields)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(fields)) + body + struct.pack("<I", 0)


def test_exif_that_cannot_be_written_again_turns_the_pixels(tmp_path):
    noise_image((16, 8)).save(tmp_path / "a.jpg", exif=exif_that_cannot_be_written(6))
    stored = np.asarray(Image.open(tmp_path / "a.jpg"))
    turned = open_image(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(turned), stored.transpose(1, 0, 2)[:, ::-1])
    turned.save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").size == turned.size, "it is turned once"


def test_backgrounds_by_name_and_number():
    assert parse_background("rebeccapurple") == (0x66, 0x33, 0x99)
    assert parse_background("#fff") == (255, 255, 255)
    assert parse_background("#01020304") == (1, 2, 3)
    assert parse_background("random") is None
    for colour in ("purpleish", "#12345", "", "1,2,3"):
        with pytest.raises(UserError, match="not a colour") as error:
            parse_background(colour)
        assert f"--background {colour}" in str(error.value)


# Variants: resizing, crops, flips.


def show(path, resolution, seed=0, **settings):
    framing = Framing(resolution=resolution, **{"center_crop": True, **settings})
    return list(images.variants(Sample(path, PROMPT), framing, seed))


def pil_pixels(image, resolution, size, top, left, resample=Image.Resampling.LANCZOS, mirror=False):
    image = image.convert("RGB").resize(size, resample)
    if mirror:
        image = ImageOps.mirror(image)
    crop = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.asarray(crop) / 127.5 - 1).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((40, 40), (16, 16), (0, 0)),
        ((64, 32), (32, 16), (0, 8)),
        ((32, 64), (16, 32), (8, 0)),
        ((50, 30), (27, 16), (0, 6)),  # 16 / 30 * 50 = 26.7; a spare of 11, half of it rounded to even
        ((4, 10), (16, 40), (12, 0)),  # enlarged
        ((1, 1), (16, 16), (0, 0)),
    ],
)
def test_the_centre_of_the_resized_image(tmp_path, size, resized, corner):
    image = noise_image(size)
    image.save(tmp_path / "a.png")
    (shown,) = show(tmp_path / "a.png", 16)
    assert shown.original_size == size[::-1]
    assert shown.crop_top_left == corner
    assert shown.pixels.dtype == torch.float32
    torch.testing.assert_close(shown.pixels, pil_pixels(image, 16, resized, *corner), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 3), (3, 300), (90, 40), (40, 90)])
@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("name", ["nearest", "bilinear", "lanczos"])
def test_an_extreme_shape_is_cropped_first_to_the_same_pixels(tmp_path, monkeypatch, size, center_crop, name):
    noise_image(size).save(tmp_path / "a.png")
    settings = {"interpolation": name, "center_crop": center_crop}
    whole = show(tmp_path / "a.png", 64, **settings)
    monkeypatch.setattr(images, "_MOST_PIXELS", 0)
    for cropped, expected in zip(show(tmp_path / "a.png", 64, **settings), whole, strict=True):
        assert cropped.crop_top_left == expected.crop_top_left
        assert cropped.original_size == expected.original_size
        difference = (cropped.pixels - expected.pixels).abs() * 127.5
        assert difference.max() <= 1.01, "8 bits round"


def test_an_extreme_shape_takes_little_memory(tmp_path, monkeypatch):
    noise_image((3000, 3)).save(tmp_path / "a.png")
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    shown = show(tmp_path / "a.png", 1024, center_crop=False)
    assert sizes == [(1024, 1024)] * len(shown) == [(1024, 1024)] * 4
    assert all(variant.pixels.shape == (3, 1024, 1024) for variant in shown)


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_interpolation(tmp_path, name):
    image = noise_image((40, 30))
    image.save(tmp_path / "a.png")
    (shown,) = show(tmp_path / "a.png", 16, interpolation=name)
    expected = pil_pixels(image, 16, (21, 16), 0, 2, Image.Resampling[name.upper()])
    torch.testing.assert_close(shown.pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(80, 16), (16, 80)])
def test_random_crops_are_where_they_say(tmp_path, size):
    image = noise_image(size)
    image.save(tmp_path / "a.png")
    corners = set()
    for seed in range(40):
        for shown in show(tmp_path / "a.png", 16, center_crop=False, seed=seed):
            expected = pil_pixels(image, 16, size, *shown.crop_top_left)
            torch.testing.assert_close(shown.pixels, expected, rtol=0, atol=1e-6)
            corners.add(shown.crop_top_left)
    along = {max(corner) for corner in corners}
    assert {min(corner) for corner in corners} == {0}
    assert (min(along), max(along)) == (0, 64), "both ends are possible"
    assert len(along) > 50


def test_random_crops_depend_on_seed_and_file_name_alone(tmp_path):
    for name in ("a.png", "b.png"):
        noise_image((800, 16)).save(tmp_path / name)
    (tmp_path / "more").mkdir()
    noise_image((800, 16)).save(tmp_path / "more" / "a.png")

    def corners(name, seed):
        return [v.crop_top_left for v in show(tmp_path / name, 16, center_crop=False, seed=seed)]

    assert corners("a.png", 0) == corners("a.png", 0) == corners("more/a.png", 0)
    assert corners("a.png", 0) != corners("a.png", 1)
    assert corners("a.png", 0) != corners("b.png", 0)


def test_a_square_has_one_crop_however_it_is_cropped(tmp_path):
    noise_image((20, 20)).save(tmp_path / "a.png")
    (centre,) = show(tmp_path / "a.png", 16)
    (any_,) = show(tmp_path / "a.png", 16, center_crop=False)
    assert torch.equal(centre.pixels, any_.pixels)
    assert any_.crop_top_left == (0, 0)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size", [(20, 20), (50, 16), (16, 51)])
def test_flips_double_the_variants(tmp_path, size, center_crop):
    noise_image(size).save(tmp_path / "a.png")
    plain = show(tmp_path / "a.png", 16, center_crop=center_crop)
    both = show(tmp_path / "a.png", 16, center_crop=center_crop, random_flip=True)
    assert len(both) == 2 * len(plain)
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(both[::2], plain, strict=True))
    for shown, mirrored in zip(both[::2], both[1::2], strict=True):
        assert torch.equal(mirrored.pixels, shown.pixels.flip(-1))


def test_a_mirrored_variant_says_where_its_crop_is_in_the_mirrored_image(tmp_path):
    """SDXL is told the crop's place in the image as it is seen, so after mirroring."""
    image = noise_image((80, 16))
    image.save(tmp_path / "a.png")
    for center_crop in (True, False):
        shown = show(tmp_path / "a.png", 16, center_crop=center_crop, random_flip=True)[1::2]
        for mirrored in shown:
            expected = pil_pixels(image, 16, (80, 16), *mirrored.crop_top_left, mirror=True)
            torch.testing.assert_close(mirrored.pixels, expected, rtol=0, atol=1e-6)


# Random backgrounds.


def save_circle(path, size=(16, 16)):
    """A red circle, its edge half transparent, on nothing."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((2, 2, 13, 13), fill=(200, 30, 40, 255), outline=(200, 30, 40, 128))
    image.save(path)
    return path


def colour_of(shown):
    """The colour in the corner, where the circle isn't."""
    return tuple(round(float(value)) for value in (shown.pixels[:, 0, 0] + 1) * 127.5)


def test_transparent_images_come_on_colours_of_their_own(tmp_path):
    path = save_circle(tmp_path / "a.png")
    shown = show(path, 16, background=None)
    colours = [colour_of(variant) for variant in shown]
    assert len(shown) == len(set(colours)) == 4
    for variant, colour in zip(shown, colours, strict=True):
        (expected,) = show(path, 16, background=colour)
        assert torch.equal(variant.pixels, expected.pixels)

    def colours_of(path, seed=0):
        return [colour_of(variant) for variant in show(path, 16, background=None, seed=seed)]

    other = save_circle(tmp_path / "b.png")
    assert colours_of(path) == colours
    assert colours_of(path, seed=1) != colours
    assert colours_of(other) != colours
    values = [value for seed in range(300) for colour in colours_of(path, seed) for value in colour]
    assert (min(values), max(values)) == (0, 255)
    spread = 256 / math.sqrt(12)  # of uniform values
    assert abs(np.mean(values) - 127.5) < 5 * spread / math.sqrt(len(values))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_opaque_images_keep_one_variant(tmp_path, mode):
    noise_image((16, 16)).convert(mode).save(tmp_path / "a.png")
    (shown,) = show(tmp_path / "a.png", 16, background=None)
    (expected,) = show(tmp_path / "a.png", 16)
    assert torch.equal(shown.pixels, expected.pixels)


def test_every_colour_comes_with_every_crop_and_flip(tmp_path):
    path = save_circle(tmp_path / "a.png", (80, 16))
    plain = show(path, 16, center_crop=False, random_flip=True)
    shown = show(path, 16, center_crop=False, random_flip=True, background=None)
    assert [v.crop_top_left for v in shown] == 4 * [v.crop_top_left for v in plain]
    assert len(shown) == 4 * len(plain) == 32
    for start in range(0, 32, 8):
        assert torch.equal(shown[start + 1].pixels, shown[start].pixels.flip(-1))


def test_random_backgrounds_are_drawn_anew_and_change_no_other_draw(icons):
    """With no width, a latent is the mean of its picture: it tells the background."""

    def encode(pixels):
        mean = fake_encode(pixels).mean
        return Latents(mean, torch.zeros_like(mean))

    white = make_cache(icons, encode).batch(range(1600))
    random_ = make_cache(icons, encode, background=None).batch(range(1600))
    assert random_.captions == white.captions
    for name in ("noise", "timesteps", "time_ids"):
        assert torch.equal(getattr(random_, name), getattr(white, name)), name
    seen = collections.Counter(tuple(latents.flatten().tolist()) for latents in random_.latents)
    assert len(seen) == 4 * len({tuple(latents.flatten().tolist()) for latents in white.latents}) == 16
    for count in seen.values():  # 400 of each icon; binomial
        assert abs(count - 100) < 5 * math.sqrt(400 * 1 / 4 * 3 / 4)


# The stream.


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_every_epoch_shows_every_sample_once(count):
    for seed in (0, 5):
        for epoch in range(5):
            seen = [sample_index(seed, epoch * count + place, count) for place in range(count)]
            assert sorted(seen) == list(range(count))


def test_the_order_differs_between_epochs_and_seeds():
    orders = [
        tuple(sample_index(seed, epoch * 24 + place, 24) for place in range(24))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    assert tuple(range(24)) not in orders


def test_every_sample_comes_first_equally_often():
    first = collections.Counter(sample_index(0, 4 * epoch, 4) for epoch in range(2000))
    for count in first.values():  # binomial with a standard deviation of sqrt(2000 * 1/4 * 3/4) = 19.4
        assert abs(count - 500) < 5 * 19.4


def test_keyed_generators():
    def draw(*key):
        return torch.rand(4, generator=keyed_generator(*key)).tolist()

    assert draw(0, "epoch", 1) == draw(0, "epoch", 1)
    assert len({tuple(draw(*key)) for key in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2)]}) == 4


def fake_encode(pixels):
    """A VAE that tells images apart: the mean shows which image it is, the deviation is known."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return Latents(mean, torch.full_like(mean, 0.25))


def make_cache(folder, encode=fake_encode, noise_levels=1000, seed=0, **settings):
    framing = Framing(**{"resolution": 16, "center_crop": True, **settings})
    return LatentCache(find_samples(folder, PROMPT), encode, framing, seed, noise_levels)


def assert_same_batch(one, other):
    assert one.captions == other.captions
    for name in ("latents", "noise", "timesteps", "time_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def joined(batches):
    first = batches[0]
    names = ("latents", "noise", "timesteps", "time_ids")
    tensors = [torch.cat([getattr(batch, name) for batch in batches]) for name in names]
    return type(first)([caption for batch in batches for caption in batch.captions], *tensors)


def test_a_sample_depends_on_its_position_alone(icons):
    noise_image((40, 16)).save(icons / "wide.png")
    settings = {"center_crop": False, "random_flip": True}
    whole = make_cache(icons, **settings).batch(range(24))
    for size in (1, 3, 8):
        cache = make_cache(icons, **settings)
        batches = [cache.batch(range(first, first + size)) for first in range(0, 24, size)]
        assert_same_batch(joined(batches), whole)
        assert_same_batch(cache.batch([7]), make_cache(icons, **settings).batch(range(7, 8)))
    torch.manual_seed(1)
    assert_same_batch(make_cache(icons, **settings).batch(range(24)), whole)
    other = make_cache(icons, seed=1, **settings).batch(range(24))
    assert not torch.equal(other.noise, whole.noise)
    assert not torch.equal(other.timesteps, whole.timesteps)


def test_latents_captions_and_time_ids_are_those_of_the_sample(icons):
    noise_image((48, 16)).save(icons / "wide.png")
    cache = make_cache(icons, resolution=16, background=(0, 0, 0))
    samples = find_samples(icons, PROMPT)
    batch = cache.batch(range(10))
    for place in range(10):
        sample = samples[sample_index(0, place, len(samples))]
        (shown,) = show(sample.path, 16, background=(0, 0, 0))
        assert batch.captions[place] == sample.caption
        expected = [*shown.original_size, *shown.crop_top_left, 16, 16]
        assert batch.time_ids[place].tolist() == expected
        error = batch.latents[place] - fake_encode(shown.pixels[None]).mean[0]
        assert error.abs().max() < 0.25 * 5
    assert [16, 48, 0, 16, 16, 16] in batch.time_ids.tolist(), "height before width, top before left"


def test_latents_are_drawn_from_the_posterior(icons):
    cache = make_cache(
        icons, lambda pixels: Latents(torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 0.5))
    )
    batch = cache.batch(range(200))
    unit = (batch.latents - 3) / 0.5
    count = unit.numel()
    for values in (unit, batch.noise):
        assert abs(values.mean()) < 5 / math.sqrt(count)
        assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    correlation = (unit * batch.noise).mean()
    assert abs(correlation) < 5 / math.sqrt(count), "the posterior's draw and the noise are independent"
    neighbours = (batch.noise[1:] * batch.noise[:-1]).mean()
    assert abs(neighbours) < 5 / math.sqrt(count), "and so are positions"


def test_a_posterior_without_width_gives_its_mean(icons):
    def encode(pixels):
        mean = fake_encode(pixels).mean
        return Latents(mean, torch.zeros_like(mean))

    (icons / "metadata.jsonl").unlink()
    for path in sorted(icons.iterdir())[1:]:
        path.unlink()
    first, second = make_cache(icons, encode).batch([0]), make_cache(icons, encode).batch([5])
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.noise, second.noise)


def test_timesteps_are_uniform(icons):
    timesteps = make_cache(icons, noise_levels=10).batch(range(4000)).timesteps
    assert timesteps.shape == (4000,)
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10, "0 to 9"
    chi_squared = ((counts - 400.0) ** 2 / 400).sum()
    assert chi_squared < 33.7  # 9 degrees of freedom, 1 in 10,000
    lag = torch.corrcoef(torch.stack([timesteps[1:], timesteps[:-1]]).double())[0, 1]
    assert abs(lag) < 5 / math.sqrt(4000)


def test_every_variant_is_shown(icons):
    for path in icons.iterdir():
        path.unlink()
    noise_image((800, 16)).save(icons / "wide.png")
    cache = make_cache(icons, center_crop=False, random_flip=True)
    batch = cache.batch(range(800))
    shown = collections.Counter(
        (tuple(ids), round(float(latents.mean()), 1))
        for ids, latents in zip(batch.time_ids.tolist(), batch.latents, strict=True)
    )
    corners = collections.Counter(tuple(ids) for ids in batch.time_ids.tolist())
    assert sum(shown.values()) == 800
    variants = show(icons / "wide.png", 16, center_crop=False, random_flip=True)
    share = collections.Counter((16, 800, *variant.crop_top_left, 16, 16) for variant in variants)
    assert corners.keys() == share.keys()
    for ids, count in corners.items():
        expected = 100 * share[ids]
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_global_rng_is_left_alone(icons):
    noise_image((40, 16)).save(icons / "wide.png")
    before = global_rng_state()
    make_cache(icons, center_crop=False, random_flip=True).batch(range(10))
    prompts = ["a", "b"]
    tokenizer = build_tokenizer()
    PromptCache((tokenizer, tokenizer), build_text_encoders(), prompts)
    images.digest(find_samples(icons, PROMPT))
    assert global_rng_state() == before


def test_prompts_are_encoded_once_and_stacked_in_order(monkeypatch):
    tokenizers, encoders = (build_tokenizer(),) * 2, build_text_encoders()
    encoded, original = [], encode_prompts

    def encode(tokenizers, encoders, prompts, chunks):
        encoded.extend(prompts)
        return original(tokenizers, encoders, prompts, chunks)

    monkeypatch.setattr(latents, "encode_prompts", encode)
    cache = PromptCache(tokenizers, encoders, ["an icon", "a fox", "an icon", ""])
    assert encoded == ["an icon", "a fox", ""]
    wanted = ["a fox", "", "an icon", "a fox"]
    with torch.no_grad():
        expected = original(tokenizers, encoders, wanted)
    actual = cache.embed(wanted)
    torch.testing.assert_close(actual.tokens, expected.tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.pooled, expected.pooled, rtol=1e-5, atol=1e-6)
    assert not actual.tokens.requires_grad
    with pytest.raises(KeyError):
        cache.embed(["never seen"])


def test_the_digest_does_not_depend_on_the_folders_place(icons, clean_copy):
    copy = clean_copy(icons)
    digests = {images.digest(find_samples(folder, PROMPT)) for folder in (icons, copy)}
    assert len(digests) == 1
    assert len(digests.pop()) == len(hashlib.sha256().hexdigest())
