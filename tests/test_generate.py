import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from flatlora_diffusion.errors import UserError
from flatlora_diffusion.generate import Drawing, compare, draw_with, load_adapter, load_pipeline, main
from tests.conftest import global_rng_state

DRAWING = Drawing(resolution=16, steps=2, guidance=3.0)


@pytest.fixture
def pipeline(base_path):
    return load_pipeline(str(base_path))


def test_columns_differ_and_switching_back_gives_the_bits_of_the_base(pipeline, adapters):
    base = draw_with(pipeline, None, "a icon", 3, DRAWING)
    for label, path in adapters.items():
        load_adapter(pipeline, label, path)
    one, other = (draw_with(pipeline, label, "a icon", 3, DRAWING) for label in adapters)
    assert len({picture.tobytes() for picture in (base, one, other)}) == 3
    assert draw_with(pipeline, None, "a icon", 3, DRAWING).tobytes() == base.tobytes()
    assert draw_with(pipeline, "LoRA", "a icon", 3, DRAWING).tobytes() == one.tobytes()


def test_every_method_starts_from_the_noise_of_the_seed(pipeline, adapters, monkeypatch):
    seen = []
    original = type(pipeline).prepare_latents

    def spy(self, *arguments, **settings):
        seen.append(original(self, *arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(type(pipeline), "prepare_latents", spy)
    load_adapter(pipeline, "lora", adapters["LoRA"])
    for adapter, seed in ((None, 7), ("lora", 7), (None, 8)):
        draw_with(pipeline, adapter, "a icon", seed, DRAWING)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_drawing_leaves_the_global_rng_alone(pipeline):
    state = global_rng_state()
    draw_with(pipeline, None, "a icon", 3, DRAWING)
    assert global_rng_state() == state


def test_a_comparison_leaves_pictures_and_a_manifest_that_draws_the_sheet_again(
    pipeline, adapters, icons, tmp_path
):
    folder = tmp_path / "pictures"
    strip = sorted(icons.glob("*.png"))
    sheet = compare(pipeline, adapters, ["a red icon", "a blue icon"], [0, 1], DRAWING, folder, strip=strip)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["columns"] == ["base", "LoRA", "Flat-LoRA"]
    assert [row["label"] for row in manifest["rows"]] == [
        f"a {colour} icon\nseed {seed}" for colour in ("red", "blue") for seed in (0, 1)
    ]
    assert len(list(folder.glob("*.png"))) == 12
    again = tmp_path / "again.png"
    command = [sys.executable, "-m", "flatlora_diffusion.grid", str(folder), "--output", str(again)]
    subprocess.run(command, check=True)
    assert Image.open(again).tobytes() == sheet.tobytes()


def test_command_line(base_path, adapters, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--resolution", "16", "--steps", "2", "--prompt", "a icon", "--seed", "4", "--device", "cpu"]
    chosen = ["--adapter", f"mine={adapters['LoRA'].parent}"]
    main(["--base", str(base_path), *chosen, *flags, "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output / "sheet.png")
    assert {p.name for p in output.iterdir()} == {
        *("000-base.png", "000-mine.png", "manifest.json", "sheet.png"),
    }


def test_bad_adapters_are_named(pipeline, adapters, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a sound safetensors file"):
        load_adapter(pipeline, "x", tmp_path / "nowhere")
    content = adapters["LoRA"].read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors: not a sound safetensors file"):
        load_adapter(pipeline, "x", cut)
    with pytest.raises(UserError, match=r"--adapter: broken: must be NAME=PATH"):
        main(["--base", "x", "--prompt", "p", "--output", "o", "--adapter", "broken"])
