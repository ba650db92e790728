"""Write the demo icons of ``assets/icons-3d``: pictures with transparency and their captions."""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from micro_data import DEMO_SUBJECTS, IMAGE_FOLDERS, NEW_STYLE, caption, fetch, read_members, read_subjects
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def write_icons(raw: Path, output: Path) -> None:
    """Write one PNG for each of `DEMO_SUBJECTS`, and ``metadata.jsonl``.

    Args:
        raw: the folder of npm tarballs; missing ones are downloaded.
        output: the folder to write.
    """
    codes = {subject["names"][0]: subject["code"] for subject in read_subjects(fetch("noto", raw))}
    members = {name: f"{IMAGE_FOLDERS[NEW_STYLE]}/{codes[name]}.webp" for name in DEMO_SUBJECTS}
    pictures = read_members(fetch(NEW_STYLE, raw), members)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in DEMO_SUBJECTS:
        file_name = name.replace(" ", "_") + ".png"
        Image.open(io.BytesIO(pictures[name])).convert("RGBA").save(output / file_name, optimize=True)
        lines.append(json.dumps({"file_name": file_name, "text": caption(NEW_STYLE, name)}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Read the command line and write the icons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "micro-sdxl", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, default=ASSETS / "icons-3d", metavar="DIR")
    arguments = parser.parse_args()
    write_icons(arguments.work / "raw", arguments.output)


if __name__ == "__main__":
    main()
