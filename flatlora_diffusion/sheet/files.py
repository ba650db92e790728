"""Contact sheets as files: the manifest beside the pictures of a grid, read and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.sheet.layout import Label, Size, contact_sheet, sheet_size

MANIFEST = "manifest.json"
STRIP_LABEL = "training images"
REFERENCE_LABEL = "real image"


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet: its label and the files of its pictures.

    Attributes:
        label: Stands beside them.
        images: One for each column.
        reference: What they should look like, in a last column.
    """

    label: Label
    images: Sequence[Path]
    reference: Path | None = None


@dataclass(frozen=True)
class Sheet:
    """A contact sheet as files and labels: what `manifest.json` in the folder of a grid records.

    Args:
        columns: Label of each column.
        rows: Rows of picture files, each with its label.
        title: Heading of the sheet.
        footer: Small print.
        strip: Files of the training pictures.
        strip_label: Heading of the training pictures.
        cell_size: As for `contact_sheet`.
        margin: As for `contact_sheet`.
    """

    columns: Sequence[Label]
    rows: Sequence[SheetRow]
    title: str | None = None
    footer: str | None = None
    strip: Sequence[Path] = ()
    strip_label: str | None = None
    cell_size: int | None = None
    margin: int | None = None

    @classmethod
    def load(cls, path: str | Path) -> Sheet:
        """Read a manifest, given the file or the folder that holds it.

        It is a JSON object `{"columns": [...], "rows": [{"label": "...", "images": ["a.png", ...]}, ...]}`
        with `title`, `footer`, `strip` (files), `strip_label`, `cell_size`, `margin` and a row's `reference`
        (a file) optional; files are relative to the manifest's folder. A label is a text, or a list of those
        of its groups and its own. Other keys are left to those who wrote them.

        Raises:
            ValueError: The manifest is missing, not JSON, or not of this form.
        """
        path = Path(path)
        path = path / MANIFEST if path.is_dir() else path
        content = read_manifest(path)

        def value(holder: dict, key: str, holds: Callable[[Any], bool], rule: str, where: str = "") -> Any:
            found = holder.get(key)
            if found is not None and not holds(found):
                raise ValueError(f"{path}: {where}{key}={found!r} must be {rule}")
            return found

        def strings(holder: dict, key: str, where: str = "") -> list[str]:
            return value(holder, key, _are_strings, "a list of strings", where) or []

        rows = content.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{path}: rows must be a list of {{"label": ..., "images": [...]}}')
        return cls(
            columns=value(content, "columns", _are_labels, "a list of strings, or of lists of strings") or [],
            rows=[
                SheetRow(
                    label=value(row, "label", _is_label, "a string or list of strings", f"rows[{index}].")
                    or "",
                    images=[path.parent / name for name in strings(row, "images", f"rows[{index}].")],
                    reference=(
                        path.parent / reference
                        if (reference := value(row, "reference", _is_string, "a string", f"rows[{index}]."))
                        else None
                    ),
                )
                for index, row in enumerate(rows)
            ],
            title=value(content, "title", _is_string, "a string"),
            footer=value(content, "footer", _is_string, "a string"),
            strip=[path.parent / name for name in strings(content, "strip")],
            strip_label=value(content, "strip_label", _is_string, "a string"),
            cell_size=value(content, "cell_size", _is_number, "a whole number"),
            margin=value(content, "margin", _is_number, "a whole number"),
        )

    def draw(self, open_file: Callable[[Path], Image.Image] | None = None) -> Image.Image:
        """Open the files and lay them out.

        Args:
            open_file: File -> its picture, where pictures are at hand that needn't be on disk.

        Raises:
            UserError: A file is missing or no picture.
            ValueError: The sheet is refused by `contact_sheet`.
        """
        cells = [[(open_file or open_image)(file) for file in row.images] for row in self.rows]
        strip, references = self._others()
        return contact_sheet(cells, strip=strip, references=references, **self._settings())

    def size(self, picture: Size) -> Size:
        """Width and height of the sheet once its pictures are there, all of the size `picture`.

        Raises:
            UserError: A file of the strip or a reference is missing or no picture.
            ValueError: `contact_sheet` would raise one.
        """
        cells = [[picture for _ in row.images] for row in self.rows]
        strip, references = self._others()
        return sheet_size(
            cells,
            strip=[image.size for image in strip],
            references=[image and image.size for image in references],
            **self._settings(),
        )

    def _others(self) -> tuple[list[Image.Image], list[Image.Image | None]]:
        """The pictures of the strip, and the references if there are any."""
        files = [row.reference for row in self.rows]
        references = [file and open_image(file) for file in files] if any(files) else []
        return [open_image(file) for file in self.strip], references

    def _settings(self) -> dict[str, Any]:
        return {
            "columns": self.columns,
            "rows": [row.label for row in self.rows],
            "title": self.title,
            "strip_label": self.strip_label,
            "reference_label": REFERENCE_LABEL,
            "cell_size": self.cell_size,
            "margin": self.margin,
            "footer": self.footer,
        }


def read_manifest(path: Path) -> dict[str, Any]:
    """The JSON object of a manifest.

    Raises:
        ValueError: The file is missing, not JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); pass a folder that holds {MANIFEST}, or pictures"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def draw_sheet(folder: Path) -> Image.Image:
    """The contact sheet of a folder with pictures and their manifest.

    Raises:
        UserError: The sheet would be too large; the pictures are in the folder all the same.
    """
    try:
        return Sheet.load(folder).draw()
    except (ValueError, UserError) as error:
        raise UserError(f"{folder} has the pictures, but no sheet can be made of them: {error}") from error


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_string, value))


def _is_label(value: Any) -> bool:
    return _is_string(value) or (_are_strings(value) and bool(value))


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_label, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
