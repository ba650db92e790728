"""Names of files that aren't UTF-8: paths are taken and printed with their bytes, texts are refused."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.adapter.file import find_file
from flatlora_diffusion.common import command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.evaluate.command import evaluation_parser
from flatlora_diffusion.evaluate.command import main as evaluate
from flatlora_diffusion.grid.command import main as draw
from flatlora_diffusion.sheet.command import main as lay_out

NAME = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(icons, tmp_path) -> Path:
    """Icons with captions, all of whose names aren't UTF-8."""
    folder = tmp_path / NAME
    icons.rename(folder)
    (folder / "metadata.jsonl").unlink()
    for path in [*folder.iterdir()]:
        path.rename(folder / f"{path.stem}{NAME}.png")
        (folder / f"{path.stem}{NAME}.txt").write_text(f"a {path.stem} icon")
    return folder


def test_a_grid_is_drawn_again_and_laid_out(folder, base_path, adapters, tmp_path, monkeypatch):
    own = ["--steps", "1", "--device", "cpu", "--adapter", f"LoRA={adapters['LoRA']}"]
    own += ["--captions", str(folder), "--limit", "2", "--strip", str(folder)]
    first, second = folder / "one", folder / "two"
    draw(["--base", str(base_path), *own, "--output", str(first)])
    again = ["grid", "--manifest", str(first), "--output", str(second), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", again)
    with (tmp_path / "told").open("w", encoding="utf-8") as told, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", told)
        with pytest.raises(SystemExit) as ended:
            command.run_command(draw)
    assert ended.value.code == 0
    assert (tmp_path / "told").read_bytes() == os.fsencode(second / "sheet.png") + b"\n"
    assert (first / "sheet.png").read_bytes() == (second / "sheet.png").read_bytes()
    lay_out([str(second), "--output", str(folder / "again.png")])
    assert Image.open(folder / "again.png").tobytes() == Image.open(first / "sheet.png").tobytes()


@pytest.mark.slow
def test_an_evaluation_is_written(folder, base_path, adapters):
    given = ["--base", str(base_path), "--adapter", f"LoRA={adapters['LoRA']}", "--parts", "losses"]
    evaluate([*given, "--heldout", str(folder), "--output", str(folder / "report"), "--device", "cpu"])
    assert (folder / "report" / "evaluation.md").is_file()


def test_an_adapter_that_safetensors_cannot_open_is_refused(adapters):
    renamed = adapters["LoRA"].rename(adapters["LoRA"].with_stem(NAME))
    with pytest.raises(UserError, match=r"no path that isn't UTF-8; rename it"):
        find_file(renamed)


@pytest.mark.parametrize("flag", ["--base", "--prompt", "--adapter"])
def test_texts_are_refused(flag):
    given = {"--base": "b", "--prompt": "p", "--adapter": "a=b", "--heldout": "h"}
    given[flag] = NAME + given[flag]
    words = [word for pair in given.items() for word in pair]
    with pytest.raises(UserError, match=rf"{flag} 'caf\\udce9.*': not text in UTF-8"):
        evaluation_parser().parse_all(words)
