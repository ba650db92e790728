"""The pictures, names and keywords of the micro SDXL: two flat emoji styles, and a 3D one that stays new."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
    "keywords": (
        "emojilib",
        "4.0.3",
        "29b5a262b7bd69149a3db1eb1d9233f739a833edb52c0b0ad55149b674e1d550"
        "ad584feb34c0ef8868504e6b1e94597de5d86ab46958db6887d25786e41b96d2",
    ),
}
BASE_STYLES = ("noto", "twemoji")  # what UNet and text encoders learn
NEW_STYLE = "fluent 3d"  # never shown to UNet and text encoders
STYLES = (*BASE_STYLES, NEW_STYLE)
IMAGE_FOLDERS = {
    "noto": "package/img/google/64",
    "twemoji": "package/img/twitter/64",
    NEW_STYLE: "package/assets",
}

# The icons of the demo (assets/icons-3d): no stage sees their 3D pictures.
DEMO_SUBJECTS = (
    *("grinning face", "smiling face with sunglasses", "robot"),
    *("dog face", "fox", "panda", "frog", "octopus", "lady beetle"),
    *("red apple", "strawberry", "hamburger", "doughnut", "birthday cake"),
    *("crown", "wrapped gift", "light bulb", "guitar"),
    *("rocket", "sailboat", "airplane"),
    *("cactus", "sunflower"),
)

# The icons that a personalised model is measured against (assets/icons-3d-heldout). The base knows their
# flat pictures; the autoencoder sees none of their pictures in any style.
HELDOUT_SUBJECTS = (
    *("winking face", "smiling face with heart eyes", "face with tears of joy", "sleeping face"),
    *("nerd face", "cowboy hat face", "pouting face", "ghost", "alien", "skull", "red heart", "blue heart"),
    *("cat face", "pig face", "bear", "koala", "penguin", "baby chick", "tropical fish", "spouting whale"),
    *("butterfly", "snail", "turtle", "honeybee", "unicorn", "mouse face"),
    *("tulip", "rose", "four leaf clover", "mushroom", "palm tree", "evergreen tree"),
    *("banana", "watermelon", "grapes", "lemon", "tomato", "carrot", "avocado", "pizza", "french fries"),
    *("cookie", "ice cream", "cupcake", "lollipop", "hot beverage"),
    *("automobile", "fire engine", "bicycle", "helicopter", "house with garden", "full moon"),
    *("glowing star", "cloud", "fire", "snowman"),
    *("soccer ball", "basketball", "balloon", "trophy", "bell", "key", "gem stone", "alarm clock"),
)

# Near-duplicates (families, clock times, a man's and a woman's picture of one activity) and lettered signs
# would take a sixth of the training steps and add little that a prompt can name.
SKIPPED_CATEGORIES = {"Flags", "Component"}
SKIPPED_SUBCATEGORIES = {"family", "alphanum", "keycap"}
NEAR_DUPLICATE = re.compile(r"^family |^clock face |facing right$")
GENDERED = re.compile(r"\b(man|woman|men|women)\b")
VARIATION_SELECTOR = "\ufe0f"
MAX_KEYWORDS = 8


@dataclass(frozen=True)
class Subject:
    """What one emoji shows.

    Attributes:
        code: its code points, lower-case and hyphenated, as file names have them.
        names: the present Unicode (CLDR) name first, then the character's old name and short names.
        keywords: CLDR and user keywords, none of which is a name.
    """

    code: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that captions use most."""
        return self.names[0]


@dataclass(frozen=True)
class Icons:
    """All subjects and their pictures.

    Attributes:
        subjects: n subjects.
        images: for each style uint8 pictures (n, SIZE, SIZE, 3) on white.
        has_3d: (n,) which subjects have a picture in the new style; without one it is white.
    """

    subjects: list[Subject]
    images: dict[str, torch.Tensor]
    has_3d: torch.Tensor

    def rows(self, names: tuple[str, ...]) -> torch.Tensor:
        """The rows of some subjects by their first name."""
        index = {subject.name: row for row, subject in enumerate(self.subjects)}
        return torch.tensor([index[name] for name in names])

    def _mask(self, names: tuple[str, ...]) -> torch.Tensor:
        mask = torch.zeros(len(self.subjects), dtype=torch.bool)
        mask[self.rows(names)] = True
        return mask

    @property
    def free_3d(self) -> torch.Tensor:
        """The rows whose 3D picture training may see: neither the demo's nor held out."""
        return (self.has_3d & ~self._mask(DEMO_SUBJECTS) & ~self._mask(HELDOUT_SUBJECTS)).nonzero().flatten()

    @property
    def autoencoder_images(self) -> torch.Tensor:
        """What the autoencoder is trained on: all styles, without any picture of a held-out subject."""
        kept = ~self._mask(HELDOUT_SUBJECTS)
        flat = [self.images[style][kept] for style in BASE_STYLES]
        return torch.cat([*flat, self.images[NEW_STYLE][self.free_3d]])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to floats in -1 to 1, (n, 3, h, w)."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def caption(style: str, subject: str) -> str:
    """The main caption template, also that of demo icons and prompts: ``a noto icon of red apple``."""
    return f"a {style} icon of {subject}"


def clean_name(name: str) -> str:
    """Lower-case words, separated by single spaces."""
    return " ".join(
        re.sub(r"[^a-z0-9']+", " ", name.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).split()
    )


def fetch(package: str, raw: Path) -> Path:
    """Download (once) and verify an npm tarball.

    Args:
        package: a key of `PACKAGES`.
        raw: the folder of tarballs; one that is already there is used.

    Returns:
        The path of the tarball.

    Raises:
        ValueError: the tarball is not the one that the recipe was written for.
    """
    name, version, digest = PACKAGES[package]
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


def read_pictures(style: str, codes: list[str], raw: Path) -> dict[str, bytes]:
    """The image files of a style, by code; subjects that the style lacks are absent."""
    extension = "webp" if style == NEW_STYLE else "png"
    wanted = {code: f"{IMAGE_FOLDERS[style]}/{code}.{extension}" for code in codes}
    return read_members(fetch(style, raw), wanted)


def composite(png: bytes, size: int = SIZE) -> np.ndarray:
    """Decode a picture, scale it to ``size`` pixels and put it on white: (size, size, 3) uint8."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _read_json(package: str, member: str, raw: Path) -> dict | list:
    return json.loads(read_members(fetch(package, raw), {"json": f"package/{member}"})["json"])


def _is_wanted(entry: dict) -> bool:
    name = clean_name(entry["name"])
    return not (
        entry["category"] in SKIPPED_CATEGORIES
        or entry["subcategory"] in SKIPPED_SUBCATEGORIES
        or not (entry["has_img_google"] and entry["has_img_twitter"])
        or NEAR_DUPLICATE.search(name)
        or ("-200D-" in entry["unified"] and GENDERED.search(name))
    )


def read_subjects(raw: Path) -> list[Subject]:
    """The subjects worth learning, in Unicode's order.

    A second name or keyword that is the first name of another subject is dropped: ``dog`` is the whole
    animal, so it is not kept as a second name of ``dog face``.
    """
    words = {
        emoji.replace(VARIATION_SELECTOR, ""): [clean_name(word) for word in found]
        for emoji, found in _read_json("keywords", "dist/emoji-en-US.json", raw).items()
    }
    entries = []
    for entry in sorted(_read_json("noto", "emoji.json", raw), key=lambda entry: entry["sort_order"]):
        if _is_wanted(entry):
            emoji = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
            entries.append((entry, words.get(emoji.replace(VARIATION_SELECTOR, ""), [])))
    first_names = {found[0] if found else clean_name(entry["name"]) for entry, found in entries}
    subjects, taken = [], set()
    for entry, found in entries:
        others = [clean_name(entry["name"]), *map(clean_name, entry["short_names"])]
        first = found[0] if found else others[0]
        if first in taken:  # two characters with one name: what a prompt means by it would be open
            continue
        taken.add(first)
        others = [text for text in others if text not in first_names and re.fullmatch(r"[a-z ]{2,}", text)]
        names = dict.fromkeys([first, *others])
        keywords = dict.fromkeys(
            word
            for word in found[1:]
            if word not in names and word not in first_names and re.fullmatch(r"[a-z ]{3,}", word)
        )
        code = entry["image"].removesuffix(".png")
        subjects.append(Subject(code, tuple(names), tuple(keywords)[:MAX_KEYWORDS]))
    return subjects


def build(raw: Path, output: Path) -> None:
    """Write ``images.npz`` and ``subjects.json`` into ``output`` from the packages.

    Args:
        raw: the folder of tarballs; missing ones are downloaded.
        output: the folder to write.
    """
    subjects = read_subjects(raw)
    codes = [subject.code for subject in subjects]
    pictures = {style: read_pictures(style, codes, raw) for style in STYLES}
    subjects = [s for s in subjects if all(s.code in pictures[style] for style in BASE_STYLES)]
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    arrays = {
        style: np.stack([composite(found[s.code]) if s.code in found else white for s in subjects])
        for style, found in pictures.items()
    }
    has_3d = np.array([subject.code in pictures[NEW_STYLE] for subject in subjects])
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "images.npz", has_3d=has_3d, **arrays)
    rows = json.dumps([vars(subject) for subject in subjects], indent=1)
    (output / "subjects.json").write_text(rows, encoding="utf-8")
    print(f"[data] {len(subjects)} subjects, {has_3d.sum()} of them in 3D", flush=True)


def load_icons(work: Path) -> Icons:
    """Read what `build` wrote."""
    rows = json.loads((work / "subjects.json").read_text(encoding="utf-8"))
    subjects = [Subject(row["code"], tuple(row["names"]), tuple(row["keywords"])) for row in rows]
    with np.load(work / "images.npz") as arrays:
        images = {style: torch.from_numpy(arrays[style]) for style in STYLES}
        return Icons(subjects, images, torch.from_numpy(arrays["has_3d"]))
