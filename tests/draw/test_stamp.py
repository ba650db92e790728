"""What pictures say of their making, read back as A1111 and its kin do."""

import contextlib
import dataclasses
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import flatlora_diffusion
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw import stamp as draw_stamp
from flatlora_diffusion.draw.stamp import Stamp, base_name, parameters, png, read, sidecar, versions

STAMP = Stamp(
    prompt="a fluent 3d icon of red apple",
    negative_prompt="blurry",
    seed=5,
    width=64,
    height=48,
    steps=30,
    guidance=4.0,
    sampler="Euler",
    base="micro-sdxl",
    method="Flat-LoRA",
    adapter_sha256="0123456789abcdef" * 4,
    scale=1.0,
    dtype="fp32",
    device="cpu",
    versions={"flatlora_diffusion": "0.1.0", "torch": "2.13.0"},
)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def parse(text):
    """What A1111's `parse_generation_parameters` makes of such a text: the prompt, and the fields.

    The last line has the fields, if there are three or more; lines before it are the prompt until one begins
    with `Negative prompt:`. A value in JSON's quotes is unquoted, and a size becomes two fields.
    """
    field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(field.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompts = {"Prompt": "", "Negative prompt": ""}
    current = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            current, line = "Negative prompt", line[16:].strip()
        prompts[current] += ("" if prompts[current] == "" else "\n") + line
    fields = {}
    for name, value in field.findall(last):
        if value[:1] == value[-1:] == '"':
            value = json.loads(value)
        if size := re.match(r"^(\d+)x(\d+)$", value):
            fields |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            fields[name] = value
    return prompts | fields


def chunks(content):
    """(kind, data) of each chunk of a PNG; the checksums must be right."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, found = 8, []
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        body = content[position + 4 : position + 8 + length]
        assert struct.unpack(">I", content[position + 8 + length :][:4])[0] == zlib.crc32(body)
        found.append((body[:4], body[4:]))
        position += 12 + length
    return found


def test_the_text_is_that_of_a1111_to_the_letter():
    assert parameters(STAMP) == (
        "a fluent 3d icon of red apple\n"
        "Negative prompt: blurry\n"
        "Steps: 30, Sampler: Euler, CFG scale: 4, Seed: 5, Size: 64x48, Model: micro-sdxl, "
        "Method: Flat-LoRA, Adapter hash: 0123456789ab, Adapter scale: 1, Version: flatlora_diffusion 0.1.0"
    )
    base = dataclasses.replace(
        STAMP, negative_prompt=None, method="base", adapter_sha256=None, scale=None, guidance=7.25
    )
    assert parameters(base) == (
        "a fluent 3d icon of red apple\n"
        "Steps: 30, Sampler: Euler, CFG scale: 7.25, Seed: 5, Size: 64x48, Model: micro-sdxl, Method: base, "
        "Version: flatlora_diffusion 0.1.0"
    )


@pytest.mark.parametrize(
    ("method", "written"),
    [("mine", "mine"), ("a: b", '"a: b"'), ("a, b", '"a, b"'), ("a\nb", '"a\\nb"'), ('a "b"', 'a "b"')],
)
def test_values_are_quoted_where_a1111_quotes_them(method, written):
    assert f", Method: {written}, Adapter hash" in parameters(dataclasses.replace(STAMP, method=method))


@pytest.mark.parametrize(
    "prompt",
    [
        "a red icon",
        "two\nlines",
        "three\n\nwith an empty one",
        "Steps: 30, Sampler: DDIM, Seed: 1, Size: 8x8",
        "an icon\nSteps: 30, Sampler: DDIM, Seed: 1",
        'a "quoted" icon, with: signs',
        "ünïcode, 写真 and 🦊",
        "back\\slash",
    ],
)
@pytest.mark.parametrize("negative", [None, "blurry", "two\nlines: and, commas"])
@pytest.mark.parametrize("method", ["Flat-LoRA", 'mine, "new": 2', "line\nbreak", "写真: 1"])
def test_every_field_parses_back(prompt, negative, method):
    stamp = dataclasses.replace(
        STAMP, prompt=prompt, negative_prompt=negative, method=method, sampler="DPM++ 2M, Karras"
    )
    assert parse(parameters(stamp)) == {
        "Prompt": prompt,
        "Negative prompt": negative or "",
        "Steps": "30",
        "Sampler": "DPM++ 2M, Karras",
        "CFG scale": "4",
        "Seed": "5",
        "Size-1": "64",
        "Size-2": "48",
        "Model": "micro-sdxl",
        "Method": method,
        "Adapter hash": "0123456789ab",
        "Adapter scale": "1",
        "Version": "flatlora_diffusion 0.1.0",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": None, "adapter_sha256": None, "scale": None, "method": "base"},
        {"prompt": "写真 🦊\nNegative prompt: in the prompt", "seed": 2**64 - 1, "scale": 0.1 + 0.2},
    ],
)
def test_a_picture_keeps_its_pixels_and_the_whole_stamp(changes, tmp_path):
    stamp = dataclasses.replace(STAMP, **changes)
    content = png(PICTURE, stamp)
    (tmp_path / "a.png").write_bytes(content)
    assert read(content) == read(tmp_path / "a.png") == stamp
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.tobytes() == PICTURE.tobytes()
        assert opened.text["parameters"] == parameters(stamp)
    assert json.loads(sidecar(stamp)) == dataclasses.asdict(stamp)
    assert Stamp(**json.loads(sidecar(stamp))) == stamp


def test_the_chunks_are_those_that_other_tools_look_for():
    plain = dict(chunks(png(PICTURE, STAMP)))
    kinds = [kind for kind, _ in chunks(png(PICTURE, STAMP))]
    assert kinds[:3] == [b"IHDR", b"tEXt", b"tEXt"] and kinds[-1] == b"IEND" and b"IDAT" in kinds
    assert plain[b"tEXt"].startswith(b"flatlora\0{")
    found = [data for kind, data in chunks(png(PICTURE, STAMP)) if kind == b"tEXt"]
    assert found[0] == b"parameters\0" + parameters(STAMP).encode("latin-1")
    latin = dataclasses.replace(STAMP, prompt="café")
    assert b"caf\xe9" in chunks(png(PICTURE, latin))[1][1]
    wide = dataclasses.replace(STAMP, prompt="写真")
    kind, data = chunks(png(PICTURE, wide))[1]
    assert kind == b"iTXt"
    assert data == b"parameters\0\0\0\0\0" + parameters(wide).encode("utf-8")


def test_the_bytes_are_the_same_each_time_and_tell_stamps_apart():
    contents = {png(PICTURE.copy(), dataclasses.replace(STAMP)) for _ in range(3)}
    assert len(contents) == 1
    assert png(PICTURE, dataclasses.replace(STAMP, device="cuda")) not in contents
    assert sidecar(STAMP) == sidecar(dataclasses.replace(STAMP))


def test_a_base_has_a_name_and_never_a_path(tmp_path, monkeypatch):
    hub = "stabilityai/stable-diffusion-xl-base-1.0"
    folder = tmp_path / "secret" / "micro-sdxl"
    folder.mkdir(parents=True)
    assert base_name(hub) == hub
    assert base_name(str(folder)) == base_name(f"{folder}/") == "micro-sdxl"
    monkeypatch.chdir(tmp_path)
    assert base_name("secret/micro-sdxl") == base_name("./secret/../secret/micro-sdxl") == "micro-sdxl"
    monkeypatch.chdir(folder)
    assert base_name(".") == "micro-sdxl"
    assert base_name("/nowhere/gone") == "gone"
    for path in (str(folder), "./secret", "../secret", "~/secret", "a/b/c"):
        with pytest.raises(ValueError, match="base: a path would tell of the computer"):
            dataclasses.replace(STAMP, base=path)
    assert dataclasses.replace(STAMP, base=hub).base == hub


def test_versions_are_those_of_the_packages():
    found = versions()
    assert list(found) == ["flatlora_diffusion", "torch", "diffusers", "transformers", "peft"]
    assert found["flatlora_diffusion"] == flatlora_diffusion.__version__
    assert all(re.match(r"\d+\.\d+", own) for own in found.values())


def saved(text=None):
    info = draw_stamp.PngInfo()
    if text is not None:
        info.add_text("flatlora", text)
    content = io.BytesIO()
    PICTURE.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def jpeg():
    content = io.BytesIO()
    PICTURE.save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(saved(), "does not say how it was made", id="none"),
        pytest.param(jpeg(), "does not say how it was made", id="JPEG"),
        pytest.param(b"junk", "cannot be read as a picture", id="junk"),
        pytest.param(b"", "cannot be read as a picture", id="nothing"),
        pytest.param(png(PICTURE, STAMP)[:3000], "cannot be read as a picture", id="cut short"),
        pytest.param(saved("{"), "its stamp was damaged", id="no JSON"),
        pytest.param(saved("[1]"), "its stamp was damaged", id="no object"),
        pytest.param(saved("[" * 99_999), "its stamp was damaged", id="deep"),
        pytest.param(saved('{"prompt": "a"}'), "its stamp was damaged", id="fields missing"),
        pytest.param(
            saved(json.dumps(dataclasses.asdict(STAMP) | {"mood": 1})), "another version", id="field unknown"
        ),
        pytest.param(saved(sidecar(STAMP).decode().replace("micro-sdxl", "/a/b")), "damaged", id="path"),
    ],
)
def test_a_picture_without_a_stamp_is_named(content, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for picture, name in ((path, str(path)), (content, "the picture")):
        with pytest.raises(UserError, match=message) as caught:
            read(picture)
        assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: cannot be read as a picture \(.*No such file"):
        read(tmp_path / "gone.png")


def test_no_damage_of_a_byte_ends_in_a_traceback():
    content = png(PICTURE.resize((4, 3)), STAMP)
    for position in range(len(content)):
        damaged = content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]
        for one in (damaged, content[:position]):
            with contextlib.suppress(UserError):
                assert isinstance(read(one), Stamp)
