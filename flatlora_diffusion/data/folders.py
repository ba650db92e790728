"""What a folder of training images holds: pictures, their captions, and what is passed over.

The caption of a picture comes from the first of these that has one: `metadata.jsonl`, `metadata.csv`, the
`.txt` file beside it, the `.caption` file beside it. In a folder of kohya's layout its name comes last.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import has_picture_name, why_no_picture

CAPTION_KEY = "text"
"""What captions are called in metadata, unless the user says something else."""

_METADATA = ("metadata.jsonl", "metadata.csv")
_SIDECARS = (".txt", ".caption")
_KOHYA = re.compile(r"(\d+)_(.*)")  # repeats, caption
_MOST_NAMES = 5  # that are told of those that are passed over for one reason


@dataclass(frozen=True)
class Picture:
    """A picture of a folder.

    Attributes:
        path: Its file.
        caption: Its own, where there is one.
        source: Where that comes from.
        repeats: How often an epoch sees it.
    """

    path: Path
    caption: str | None
    source: str | None
    repeats: int = 1


@dataclass
class FolderContents:
    """What was found, with the words for it.

    Attributes:
        pictures: By name.
        parts: Sub-folders that were read -> how many pictures and repeats they have.
        reasons: Why something is passed over -> the names of all that is.
    """

    pictures: list[Picture] = field(default_factory=list)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))

    @property
    def summary(self) -> str:
        """How many pictures there are, and where their captions are from."""
        count = len(self.pictures)
        parts = [f"{name}/: {number} x {repeats}" for name, (number, repeats) in self.parts.items()]
        sources = collections.Counter(picture.source for picture in self.pictures if picture.source)
        captions = [f"{number} from {source}" for source, number in sources.items()]
        return (
            f"{count} image{'s' * (count != 1)}{_bracketed(parts)}, {sources.total()} with "
            f"captions{_bracketed(captions)}, {count - sources.total()} without"
        )

    @property
    def passed_over(self) -> str:
        """What is passed over and why; empty where nothing is."""
        return "; ".join(f"{_some(names)} ({reason})" for reason, names in self.reasons.items())


def read_folder(
    folder: Path, caption_key: str = CAPTION_KEY, *, kohya_folders: bool = False
) -> FolderContents:
    """The pictures of a folder with their captions, by name. Pictures aren't opened.

    Args:
        folder: One that exists.
        caption_key: What captions are called in `metadata.jsonl` and `metadata.csv`.
        kohya_folders: Read sub-folders such as `10_fox` too: pictures that an epoch sees 10 times, and whose
            caption is `fox` where they have none.

    Raises:
        UserError: Metadata or captions cannot be read, or a line names a picture that isn't there.
    """
    contents = FolderContents()
    found = _pictures_in(folder, caption_key, contents.reasons)
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if has_picture_name(child):
            continue  # which is told when it is opened
        match = _KOHYA.fullmatch(child.name)
        repeats = int(match[1]) if match else 0
        inside = [path for path in _pictures_below(child) if path not in found]
        if kohya_folders and match and repeats:
            own = _pictures_in(child, caption_key, contents.reasons, prefix=f"{child.name}/")
            for path, picture in own.items():
                listed = found.get(path)
                caption, source = (listed or picture).caption, (listed or picture).source
                if not caption:
                    caption, source = _text(match[2], child), "the folder's name"
                found[path] = Picture(path, caption or None, source if caption else None, repeats)
            if own:
                contents.parts[child.name] = (len(own), repeats)
            inside = [path for path in inside if path not in found]
        if inside:
            reason = "sub-folder with pictures"
            if repeats and not kohya_folders:
                reason = "sub-folder in kohya's layout, which --kohya_folders reads"
            contents.reasons[reason].append(f"{child.name}/: {len(inside)}")
    contents.pictures = [found[path] for path in sorted(found)]
    return contents


def _pictures_in(
    folder: Path, caption_key: str, reasons: dict[str, list[str]], prefix: str = ""
) -> dict[Path, Picture]:
    """The pictures of one folder, and those that its metadata lists; notes what else is there.

    Args:
        folder: Where.
        caption_key: What captions are called in its metadata.
        reasons: Gets the names of what is passed over.
        prefix: Of those names.
    """
    metadata = {name: _read_metadata(folder / name, caption_key) for name in _METADATA}
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = {path for path in files if has_picture_name(path)}.union(*metadata.values())
    beside = {parent: _sidecars(parent) for parent in {folder, *(path.parent for path in pictures)}}
    found, read = {}, set()
    for path in pictures:
        sidecars = beside[path.parent].get(path.stem, [])
        read.update(sidecars)
        texts = [(name, name, own[path]) for name, own in metadata.items() if path in own]
        texts += ((f"{file.suffix} files", file.name, _read_text(file).strip()) for file in sidecars)
        told = [(source, name, text) for source, name, text in texts if text]
        source, _, caption = told[0] if told else (None, None, None)
        found[path] = Picture(path, caption, source)
        for _, name, _ in told[1:]:
            names = reasons[f"captions are from {source}"]
            names += [prefix + name] if prefix + name not in names else []
    for path in files:
        if path in pictures or path in read or path.name in _METADATA or not path.is_file():
            continue
        if path.suffix.lower() in _SIDECARS:
            reasons["no picture beside it"].append(prefix + path.name)
        elif reason := why_no_picture(path):
            reasons[reason].append(prefix + path.name)
    return found


def _pictures_below(folder: Path) -> Iterator[Path]:
    """All pictures of a folder and of those in it, but for hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for path in (Path(place, name) for name in files) if has_picture_name(path))


def _sidecars(folder: Path) -> dict[str, list[Path]]:
    """Stem of a picture -> the files that may hold its caption, the first one first."""
    found: dict[str, list[Path]] = collections.defaultdict(list)
    for suffix in _SIDECARS:
        for path in sorted(folder.iterdir(), reverse=True):  # small letters first
            if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file():
                found[path.stem].append(path)
    return found


def _read_metadata(path: Path, caption_key: str) -> dict[Path, str]:
    """Picture -> its caption, which may be empty."""
    if not path.exists():
        return {}
    entries = _json_entries(path) if path.suffix == ".jsonl" else _csv_entries(path)
    captions = {}
    for number, entry in entries:
        where = f"{path}, line {number}"
        try:
            name, text = entry["file_name"], entry[caption_key]
        except (KeyError, TypeError) as error:
            met = f" (its keys: {', '.join(map(str, entry))})" if isinstance(error, KeyError) else ""
            wanted = f'{{"file_name": "...", "{caption_key}": "..."}}'
            if path.suffix == ".csv":
                wanted, met = f"of columns file_name and {caption_key}", met.replace("keys", "columns")
            raise UserError(f"{where}: must be {wanted}{met}") from error
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(f"{where}: file_name and {caption_key} must both be strings")
        image = path.parent / name
        if not image.is_file():
            raise UserError(f"{where}: there is no image {name} beside it")
        captions[image] = _text(text.strip(), where)
    return captions


def _json_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of JSON with their numbers; what isn't JSON stands for itself."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _csv_entries(path: Path) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """The rows of a table by the names of its columns, with the numbers of the lines in which they end."""
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: cannot be read as a table ({error})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _text(caption: str, where: object) -> str:
    """A caption that can be written as UTF-8.

    Raises:
        UserError: It holds half a character, as names of files and JSON may.
    """
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the caption {caption!r} isn't text in Unicode; mend it") from error
    return caption


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _bracketed(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""
