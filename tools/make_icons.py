"""Write the folders of icons.

``icons-3d`` is what the demo learns, ``icons-3d-heldout`` what it is judged by, and ``icons-flat`` what it
should still know: icons of the styles of its base.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from micro_data import (
    BASE_STYLES,
    DEMO_SUBJECTS,
    HELDOUT_SUBJECTS,
    NEW_STYLE,
    caption,
    read_pictures,
    read_subjects,
)
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"

# Subjects of assets/icons-flat: none is trained in 3D, half of them are held out there.
FLAT_SUBJECTS = (
    *("winking face", "sleeping face", "ghost", "cat face", "penguin", "turtle", "butterfly"),
    *("pizza", "banana", "cookie", "watermelon", "bicycle", "key", "trophy", "red heart", "glowing star"),
    # Half of them are not.
    *("thinking face", "face screaming in fear", "clown face", "lion", "elephant", "owl"),
    *("croissant", "cherries", "sushi", "umbrella", "camera", "anchor"),
    *("no entry", "warning", "recycling symbol", "check mark button"),
)


def to_png(picture: bytes) -> bytes:
    """A picture as a PNG with transparency; one that is a PNG already stays as it is."""
    image = Image.open(io.BytesIO(picture))
    if image.format == "PNG":
        return picture
    content = io.BytesIO()
    image.convert("RGBA").save(content, "PNG", optimize=True)
    return content.getvalue()


def write_icons(raw: Path, output: Path, styles: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Write one PNG for each subject in each style, and ``metadata.jsonl`` with the captions.

    Args:
        raw: the folder of npm tarballs; missing ones are downloaded.
        output: the folder to write.
        styles: keys of `PACKAGES`; where there are several, files are called by style and subject.
        names: the subjects' first names.
    """
    codes = {subject.name: subject.code for subject in read_subjects(raw)}
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for style in styles:
        pictures = read_pictures(style, [codes[name] for name in names], raw)
        for name in names:
            words = name if len(styles) == 1 else f"{style} {name}"
            file_name = words.replace(" ", "_") + ".png"
            (output / file_name).write_bytes(to_png(pictures[codes[name]]))
            lines.append(json.dumps({"file_name": file_name, "text": caption(style, name)}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and write all folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "micro-sdxl", metavar="DIR"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, metavar="DIR")
    arguments = parser.parse_args()
    raw = arguments.work / "raw"
    write_icons(raw, arguments.assets / "icons-3d", (NEW_STYLE,), DEMO_SUBJECTS)
    write_icons(raw, arguments.assets / "icons-3d-heldout", (NEW_STYLE,), HELDOUT_SUBJECTS)
    write_icons(raw, arguments.assets / "icons-flat", BASE_STYLES, FLAT_SUBJECTS)


if __name__ == "__main__":
    main()
