"""Captions of a folder: made of names, given a trigger, written where the folder has them, checked."""

from __future__ import annotations

import collections
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from flatlora_diffusion.common.command import is_unicode
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.files import write_atomically
from flatlora_diffusion.data.folders import Picture
from flatlora_diffusion.data.images import PROMPT_PLACEHOLDER
from flatlora_diffusion.sdxl.base import load_tokenizers
from flatlora_diffusion.sdxl.encoding import where_cut
from flatlora_diffusion.sdxl.single_file import clip_tokenizer

_JSONL, _CSV = "metadata.jsonl", "metadata.csv"
_BETWEEN_WORDS = re.compile(r"[\s_\-.+]+")
_COUNT = re.compile(r"(?<=\D)\s*[(\[]?\d+[)\]]?$")  # fox 2, fox (2), fox2


def name_in_words(path: Path) -> str:
    """What a picture's file is called, in words: of `birthday_cake-02.png` birthday cake."""
    words = _BETWEEN_WORDS.sub(" ", path.stem).strip()
    return _COUNT.sub("", words).strip() or words


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger before it, where it has none; capitals don't count for SDXL.

    The instance prompt, where a caption names it, is taken to have the trigger.
    """
    found = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE)
    return caption if found or PROMPT_PLACEHOLDER in caption else f"{trigger}, {caption}"


def tokenizers_of(base: str | None) -> Sequence[CLIPTokenizer]:
    """The tokenizers of a base, or SDXL's own, which come with this package.

    Raises:
        UserError: The base is missing, damaged or not SDXL.
    """
    return load_tokenizers(base, "--base") if base else (clip_tokenizer("!"),)


def write_captions(
    folder: Path, pictures: Iterable[Picture], captions: Mapping[Path, str], key: str
) -> Counter[str]:
    """Write captions where those of the pictures are: in metadata, or in a file beside each.

    New ones go into the `metadata.jsonl` of their folder where there is one, else into .txt files.

    Args:
        folder: The whole folder, whose metadata may tell of pictures in others below it.
        pictures: What they have now.
        captions: Picture -> what it gets.
        key: What captions are called in metadata.

    Returns:
        Where they were written -> how many.

    Raises:
        UserError: Two pictures would share one .txt file, a name isn't text, or a file cannot be written.
    """
    files: dict[Path, dict[Path, str]] = collections.defaultdict(dict)
    beside: dict[Path, tuple[Path, str]] = {}
    for picture in pictures:
        path, caption = picture.path, captions[picture.path]
        if not is_unicode(path.name + caption):
            raise UserError(f"{path}: its name or caption isn't text in UTF-8; rename it")
        own = [place / _JSONL for place in (path.parent, folder) if (place / _JSONL).is_file()]
        if picture.source == _CSV:
            own = [place / _CSV for place in (path.parent, folder) if (place / _CSV).is_file()]
        elif picture.source not in (None, _JSONL, "the folder's name"):
            own = []
        listing = [file for file in own if path in _listed(file)]
        if listing or (own and picture.source is None):
            files[(listing or own)[0]][path] = caption
            continue
        file = path.with_suffix(".caption" if picture.source == ".caption files" else ".txt")
        other, text = beside.setdefault(file, (path, caption))
        if text != caption:
            raise UserError(f"{path}: shares {file.name} with {other.name}; rename one of the two pictures")
    for file, own in files.items():
        write_atomically(file, _rewritten(file, own, key).encode())
    for file, (_, caption) in beside.items():
        write_atomically(file, f"{caption}\n".encode())
    return Counter({str(file): len(own) for file, own in files.items()}) + Counter(
        f"{file.suffix} files" for file in beside
    )


def _listed(file: Path) -> set[Path]:
    """The pictures that metadata tells of."""
    return {file.parent / entry["file_name"] for entry in _entries(file)}


def _entries(file: Path) -> list[dict[str, Any]]:
    """Of metadata that was read before, and so is sound."""
    text = file.read_text(encoding="utf-8-sig")
    if file.name == _CSV:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _rewritten(file: Path, captions: Mapping[Path, str], key: str) -> str:
    """The metadata with other captions for some pictures; all else that it says stays."""
    entries = _entries(file)
    for entry in entries:
        if (path := file.parent / entry["file_name"]) in captions:
            entry[key] = captions[path]
    if file.name == _CSV:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(entries[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
        return table.getvalue()
    new = [path for path in captions if path not in _listed(file)]
    entries += [{"file_name": path.relative_to(file.parent).as_posix(), key: captions[path]} for path in new]
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def problems(
    pictures: Sequence[Picture], folder: Path, tokenizers: Sequence[CLIPTokenizer], chunks: int
) -> dict[str, list[str]]:
    """What is wrong with captions: a line for each picture, by kind.

    Args:
        pictures: Of a folder.
        folder: That folder; pictures are named from it.
        tokenizers: Of the text encoders that will read the captions.
        chunks: Pieces that they read, see `sdxl.encoding.encode_prompts`.
    """
    without, cut, repeated = [], [], []
    first: dict[str, str] = {}
    for picture in pictures:
        name = picture.path.relative_to(folder).as_posix()
        if not picture.caption:
            without.append(name)
            continue
        if told := where_cut(tokenizers, picture.caption, chunks):
            cut.append(f"{name}: {told}")
        other = first.setdefault(" ".join(picture.caption.lower().split()), name)
        if other != name:
            repeated.append(f'{name}: "{picture.caption}", as {other} has')
    return {"without a caption": without, "cut": cut, "repeated": repeated}
