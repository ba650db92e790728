"""Write the folders of icons.

``icons-3d`` is what the demo learns, ``icons-3d-heldout`` what it is judged by, and ``icons-flat`` what it
should still know: icons of the styles of its base. ``icons-streamline`` and ``icons-streamline-heldout`` are
a second style to be taught, with the same subjects where it has them.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from micro_data import caption, read_pictures
from micro_subjects import (
    DEMO_SUBJECTS,
    HELDOUT_SUBJECTS,
    STREAMLINE_DEMO_SUBJECTS,
    STREAMLINE_HELDOUT_SUBJECTS,
    Subject,
    read_subjects,
)
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"

SIZE = 256  # pixels a side that vectors are drawn at, that of the 3D pictures
FLAT_STYLES = ("noto", "twemoji")

# Subjects of assets/icons-flat: none is trained in 3D, half of them are held out there.
FLAT_SUBJECTS = (
    *("winking face", "sleeping face", "ghost", "cat face", "penguin", "turtle", "butterfly"),
    *("pizza", "banana", "cookie", "watermelon", "bicycle", "key", "trophy", "red heart", "glowing star"),
    # Half of them are not.
    *("crying face", "spider", "pile of poo", "elephant", "snake", "dolphin"),
    *("cherries", "sushi", "pineapple", "umbrella", "camera", "anchor"),
    *("castle", "rainbow", "hammer", "scissors"),
)


def to_png(picture: bytes) -> bytes:
    """A picture as a PNG with transparency; one that is a PNG already stays as it is."""
    image = Image.open(io.BytesIO(picture))
    if image.format == "PNG":
        return picture
    content = io.BytesIO()
    image.convert("RGBA").save(content, "PNG", optimize=True)
    return content.getvalue()


def write_icons(raw: Path, output: Path, styles: tuple[str, ...], subjects: list[Subject]) -> None:
    """Write one PNG for each subject in each style, and ``metadata.jsonl`` with the captions.

    Args:
        raw: the folder of npm tarballs; missing ones are downloaded.
        output: the folder to write.
        styles: keys of `PACKAGES`; where there are several, files are called by style and subject.
        subjects: what to write; each must stand in all styles.
    """
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for style in styles:
        pictures = read_pictures(style, subjects, raw, SIZE)
        for subject in subjects:
            words = subject.name if len(styles) == 1 else f"{style} {subject.name}"
            file_name = words.replace(" ", "_") + ".png"
            (output / file_name).write_bytes(to_png(pictures[subject.code]))
            lines.append(json.dumps({"file_name": file_name, "text": caption(style, subject.name)}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")


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
    raw, assets = arguments.work / "raw", arguments.assets
    subjects = {subject.name: subject for subject in read_subjects(raw)}

    def find(names: tuple[str, ...], style: str) -> list[Subject]:
        return [subjects[name] for name in names if style in subjects[name].icons]

    write_icons(raw, assets / "icons-3d", ("fluent 3d",), find(DEMO_SUBJECTS, "fluent 3d"))
    write_icons(raw, assets / "icons-3d-heldout", ("fluent 3d",), find(HELDOUT_SUBJECTS, "fluent 3d"))
    demo = find((*DEMO_SUBJECTS, *STREAMLINE_DEMO_SUBJECTS), "streamline")
    write_icons(raw, assets / "icons-streamline", ("streamline",), demo)
    heldout = find((*HELDOUT_SUBJECTS, *STREAMLINE_HELDOUT_SUBJECTS), "streamline")
    write_icons(raw, assets / "icons-streamline-heldout", ("streamline",), heldout)
    write_icons(raw, assets / "icons-flat", FLAT_STYLES, [subjects[name] for name in FLAT_SUBJECTS])


if __name__ == "__main__":
    main()
