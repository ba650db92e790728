"""The pictures of the micro SDXL: six flat emoji styles that it learns, and two that stay new."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from micro_packages import fetch, read_json, read_members, read_wheel
from micro_subjects import (
    BASE_STYLES,
    DEMO_SUBJECTS,
    HELDOUT_SUBJECTS,
    NEW_STYLES,
    STREAMLINE_DEMO_SUBJECTS,
    STREAMLINE_HELDOUT_SUBJECTS,
    STYLES,
    Subject,
    read_subjects,
)
from PIL import Image

SIZE = 128  # pixels a side


@dataclass(frozen=True)
class Icons:
    """All subjects and their pictures.

    Attributes:
        subjects: n subjects.
        images: for each style uint8 pictures (n, SIZE, SIZE, 3) on white; one that is lacking is white.
        has: for each style (n,) which subjects it has.
    """

    subjects: list[Subject]
    images: dict[str, torch.Tensor]
    has: dict[str, torch.Tensor]

    def rows(self, names: tuple[str, ...]) -> torch.Tensor:
        """The rows of some subjects by their first name."""
        index = {subject.name: row for row, subject in enumerate(self.subjects)}
        return torch.tensor([index[name] for name in names])

    def _mask(self, names: tuple[str, ...]) -> torch.Tensor:
        mask = torch.zeros(len(self.subjects), dtype=torch.bool)
        mask[self.rows(names)] = True
        return mask

    def free(self, style: str) -> torch.Tensor:
        """The rows of a new style that training may see: neither the demo's nor held out."""
        unseen = (*DEMO_SUBJECTS, *HELDOUT_SUBJECTS, *STREAMLINE_DEMO_SUBJECTS, *STREAMLINE_HELDOUT_SUBJECTS)
        return (self.has[style] & ~self._mask(unseen)).nonzero().flatten()

    def base_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The style and subject indices of all pictures in the base styles."""
        return torch.stack([self.has[style] for style in BASE_STYLES]).nonzero(as_tuple=True)

    @property
    def autoencoder_images(self) -> torch.Tensor:
        """What the autoencoder is trained on: all styles, without any picture of a held-out subject."""
        kept = ~self._mask(HELDOUT_SUBJECTS)
        flat = [self.images[style][self.has[style] & kept] for style in BASE_STYLES]
        return torch.cat([*flat, *(self.images[style][self.free(style)] for style in NEW_STYLES)])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to floats in -1 to 1, (n, 3, h, w)."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def caption(style: str, subject: str) -> str:
    """The main caption template, also that of demo icons and prompts: ``a noto icon of red apple``."""
    return f"a {style} icon of {subject}"


def render(icon_set: dict, name: str, size: int) -> bytes:
    """Draw an icon of an iconify set, centred in a square: a PNG of ``size`` pixels with transparency."""
    import resvg_py  # only the data stage needs it

    icon = icon_set["icons"][name]
    box = [
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


def read_pictures(style: str, subjects: list[Subject], raw: Path, size: int = SIZE) -> dict[str, bytes]:
    """The image files of a style, by the subject's code; subjects that the style lacks are absent.

    Vectors are drawn at ``size`` pixels; 3D pictures have the size that they came with.
    """
    icons = {subject.code: subject.icons[style] for subject in subjects if style in subject.icons}
    if style == "fluent 3d":
        return read_members(fetch(style, raw), icons)
    icon_set = read_json(style, "icons.json", raw)
    return {code: render(icon_set, name, size) for code, name in icons.items()}


def composite(picture: bytes, size: int = SIZE) -> np.ndarray:
    """Decode a picture, scale it to ``size`` pixels and put it on white: (size, size, 3) uint8."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    if image.size != (size, size):
        # With premultiplied alpha, so that colours behind transparency don't bleed into edges.
        image = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def build(raw: Path, output: Path) -> None:
    """Write ``images.npz``, ``subjects.json`` and ``merges.txt`` into ``output`` from the packages.

    Args:
        raw: the folder of tarballs; missing ones are downloaded.
        output: the folder to write.
    """
    subjects = read_subjects(raw)
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    arrays = {}
    for style in STYLES:
        found = read_pictures(style, subjects, raw)
        arrays[style] = np.stack([composite(found[s.code]) if s.code in found else white for s in subjects])
        print(f"[data] {style}: {len(found)} of {len(subjects)} subjects", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "images.npz", **arrays)
    (output / "subjects.json").write_text(json.dumps([asdict(subject) for subject in subjects], indent=1))
    words = gzip.decompress(read_wheel("clip words", "tinyclip/bpe_simple_vocab_16e6.txt.gz", raw)).decode()
    # The first line is a heading; CLIP takes as many of the rest as make 49,408 tokens.
    (output / "merges.txt").write_text("\n".join(words.split("\n")[1:48_895]), encoding="utf-8")


def load_subjects(work: Path) -> list[Subject]:
    """Read the subjects that `build` wrote."""
    rows = json.loads((work / "subjects.json").read_text())
    return [Subject(r["code"], tuple(r["names"]), tuple(r["keywords"]), r["icons"]) for r in rows]


def load_icons(work: Path) -> Icons:
    """Read what `build` wrote."""
    subjects = load_subjects(work)
    has = {style: torch.tensor([style in subject.icons for subject in subjects]) for style in STYLES}
    with np.load(work / "images.npz") as arrays:
        return Icons(subjects, {style: torch.from_numpy(arrays[style]) for style in STYLES}, has)


def load_merges(work: Path) -> list[tuple[str, str]]:
    """All merges of CLIP's vocabulary, in their order."""
    lines = (work / "merges.txt").read_text(encoding="utf-8").split("\n")
    return [tuple(line.split()) for line in lines]
