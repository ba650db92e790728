"""Write the 3D icons: ``icons-3d``, which the demo learns, and ``icons-3d-heldout``, what it is judged by."""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from micro_data import DEMO_SUBJECTS, HELDOUT_SUBJECTS, NEW_STYLE, caption, read_pictures, read_subjects
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def write_icons(raw: Path, output: Path, names: tuple[str, ...]) -> None:
    """Write one PNG with transparency for each subject, and ``metadata.jsonl`` with the captions.

    Args:
        raw: the folder of npm tarballs; missing ones are downloaded.
        output: the folder to write.
        names: the subjects' first names.
    """
    codes = {subject.name: subject.code for subject in read_subjects(raw)}
    pictures = read_pictures(NEW_STYLE, [codes[name] for name in names], raw)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in names:
        file_name = name.replace(" ", "_") + ".png"
        picture = Image.open(io.BytesIO(pictures[codes[name]])).convert("RGBA")
        picture.save(output / file_name, optimize=True)
        lines.append(json.dumps({"file_name": file_name, "text": caption(NEW_STYLE, name)}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Read the command line and write both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "micro-sdxl", metavar="DIR"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, metavar="DIR")
    arguments = parser.parse_args()
    raw = arguments.work / "raw"
    write_icons(raw, arguments.assets / "icons-3d", DEMO_SUBJECTS)
    write_icons(raw, arguments.assets / "icons-3d-heldout", HELDOUT_SUBJECTS)


if __name__ == "__main__":
    main()
