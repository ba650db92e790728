"""The pictures and captions of the micro SDXL: two flat emoji styles, and a 3D one for the autoencoder."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # pixels a side, the native size of the flat sets

# npm tarballs: package name, version, SHA-512 of the tarball.
PACKAGES = {
    "noto": (
        "emoji-datasource-google",
        "16.0.0",
        "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
        "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b5465378a4b613"
        "cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
    ),
    "fluent 3d": (
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb4"
        "45d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee",
    ),
}
BASE_STYLES = ("noto", "twemoji")  # what UNet and text encoders learn
NEW_STYLE = "fluent 3d"  # never shown to UNet and text encoders
IMAGE_FOLDERS = {
    "noto": "package/img/google/64",
    "twemoji": "package/img/twitter/64",
    NEW_STYLE: "package/assets",
}

# The icons of the demo (assets/icons-3d): no stage sees their 3D pictures.
DEMO_SUBJECTS = (
    *("grinning face", "smiling face with sunglasses", "robot face"),
    *("dog face", "fox face", "panda face", "frog face", "octopus", "lady beetle"),
    *("red apple", "strawberry", "hamburger", "doughnut", "birthday cake"),
    *("crown", "wrapped present", "electric light bulb", "guitar"),
    *("rocket", "sailboat", "airplane"),
    *("cactus", "sunflower"),
)

# Near-duplicates (families, clock times, a man's and a woman's picture of one activity) and lettered signs
# would take a sixth of the training steps and add little that a prompt can name.
SKIPPED_CATEGORIES = {"Flags", "Component"}
SKIPPED_SUBCATEGORIES = {"family", "alphanum", "keycap"}
NEAR_DUPLICATE = re.compile(r"^family |^clock face |facing right$")
GENDERED = re.compile(r"\b(man|woman|men|women)\b")
NOISE_WORDS = re.compile(r"\b(symbol|sign|ornament|emoji|with variation selector)\b")


def caption(style: str, subject: str) -> str:
    """The one caption template of base, demo icons and prompts, e.g. ``a noto icon of red apple``."""
    return f"a {style} icon of {subject}"


def plain_caption(subject: str) -> str:
    """The caption without a style, e.g. ``an icon of red apple``."""
    return f"an icon of {subject}"


def _clean(name: str) -> str:
    name = NOISE_WORDS.sub(" ", re.sub(r"[^a-z0-9']+", " ", name.lower()))
    return " ".join(name.split())


def fetch(style: str, raw: Path) -> Path:
    """Download (once) and verify the npm tarball of a style.

    Args:
        style: a key of `PACKAGES`.
        raw: the folder of tarballs; one that is already there is used.

    Returns:
        The path of the tarball.

    Raises:
        ValueError: the tarball is not the one that the recipe was written for.
    """
    name, version, digest = PACKAGES[style]
    path = raw / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        raw.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=raw, check=True, stdout=subprocess.DEVNULL)
    if hashlib.sha512(path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} has another SHA-512 than {name}@{version}; delete it and run again")
    return path


def read_members(path: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """Read files of a tarball ``{key: member name}`` to ``{key: content}``, without absent ones."""
    keys = {member: key for key, member in wanted.items()}
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in keys:
                found[keys[member.name]] = archive.extractfile(member).read()
    return found


def composite(png: bytes, size: int = SIZE) -> np.ndarray:
    """Decode a picture, scale it to ``size`` pixels and put it on white: (size, size, 3) uint8."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def read_subjects(tarball: Path) -> list[dict]:
    """The subjects of ``emoji.json`` worth learning: ``code`` (lower-case code points), ``names``, ``kind``.

    The first name is the Unicode one. Short names follow where they name no other subject: ``dog`` is the
    whole animal, so it is not kept as a second name of ``dog face``.
    """
    entries = json.loads(read_members(tarball, {"json": "package/emoji.json"})["json"])
    entries = sorted(entries, key=lambda entry: entry["sort_order"])
    main_names = {_clean(entry["name"]) for entry in entries}
    subjects = []
    for entry in entries:
        name = _clean(entry["name"])
        skipped = (
            entry["category"] in SKIPPED_CATEGORIES
            or entry["subcategory"] in SKIPPED_SUBCATEGORIES
            or not (entry["has_img_google"] and entry["has_img_twitter"])
            or NEAR_DUPLICATE.search(name)
            or ("-200D-" in entry["unified"] and GENDERED.search(name))
        )
        if not skipped:
            others = dict.fromkeys(_clean(text) for text in entry["short_names"])
            others = [text for text in others if text not in main_names and re.fullmatch(r"[a-z ]{2,}", text)]
            code = entry["image"].removesuffix(".png")
            subjects.append({"code": code, "names": [name, *others], "kind": entry["category"]})
    return subjects


def build(raw: Path, output: Path) -> None:
    """Write ``images.npz`` (one uint8 array a style) and ``subjects.json`` into ``output``.

    Args:
        raw: the folder of tarballs.
        output: the folder to write.
    """
    subjects = read_subjects(fetch("noto", raw))
    arrays = {}
    for style in PACKAGES:
        extension = "webp" if style == NEW_STYLE else "png"
        wanted = {s["code"]: f"{IMAGE_FOLDERS[style]}/{s['code']}.{extension}" for s in subjects}
        found = read_members(fetch(style, raw), wanted)
        if style in BASE_STYLES:
            subjects = [s for s in subjects if s["code"] in found]
            codes = [s["code"] for s in subjects]
        else:
            codes = [s["code"] for s in subjects if s["code"] in found and s["names"][0] not in DEMO_SUBJECTS]
        arrays[style] = np.stack([composite(found[code]) for code in codes])
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "images.npz", **arrays)
    (output / "subjects.json").write_text(json.dumps(subjects, indent=1))
    print({style: array.shape for style, array in arrays.items()}, flush=True)
