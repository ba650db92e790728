"""Several adapters at once: the sum of their updates, in grids, evaluation and the app's engine."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from torch.testing import assert_close

from flatlora_diffusion.adapter.mix import Mix, mix_digest, parse_scaled, parse_source
from flatlora_diffusion.app.engine import Drawn, Job, Studio
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import parameters, read
from flatlora_diffusion.evaluate.merged import merged_unet
from flatlora_diffusion.evaluate.request import evaluate, read_plan
from flatlora_diffusion.grid.command import main
from flatlora_diffusion.grid.recipe import Recipe

DRAWING = Drawing(16, 16, 2, 3.0)


@pytest.fixture
def pipeline(base_path):
    return load_pipeline(str(base_path))


@pytest.fixture
def mix(adapters) -> Mix:
    return Mix(((adapters["LoRA"], 0.8), (adapters["Flat-LoRA"], 0.5)))


def said(mix: Mix, name: str = "mix") -> str:
    return f"{name}=" + "+".join(f"{path}@{scale}" for path, scale in mix.parts)


def test_its_update_is_the_sum_of_the_others(pipeline, adapters, mix):
    facts = load_adapter(pipeline, "mix", mix)
    for label, path in adapters.items():
        load_adapter(pipeline, label.replace("-", "_"), path)
    base = merged_unet(pipeline, None).state_dict()
    changed = {
        name: merged_unet(pipeline, name, scale).state_dict()
        for name, scale in (("LoRA", 0.8), ("Flat_LoRA", 0.5), ("mix", 1.0))
    }
    half = merged_unet(pipeline, "mix", 0.5).state_dict()
    for key, weight in base.items():
        update = sum(changed[name][key] - weight for name in ("LoRA", "Flat_LoRA"))
        assert_close(changed["mix"][key] - weight, update, rtol=1e-4, atol=1e-6)
        assert_close(half[key] - weight, update / 2, rtol=1e-4, atol=1e-6)
    assert facts.source == mix and facts.layers == 2 * facts.mix[0][0].layers
    hashes = [(own.sha256, scale) for own, scale in facts.mix]
    assert facts.sha256 == mix_digest(hashes) == mix_digest(hashes[::-1]) != mix_digest(hashes[:1])


def test_switching_to_one_of_them_and_back(pipeline, adapters, mix):
    load_adapter(pipeline, "mix", mix)
    load_adapter(pipeline, "one", adapters["LoRA"])
    pictures = [draw_with(pipeline, n, "a icon", 1, DRAWING).tobytes() for n in ("mix", "one", None, "mix")]
    assert pictures[0] == pictures[3] and len(set(pictures)) == 3


def test_a_grid_with_a_mix_is_drawn_again_and_says_what_it_is(base_path, adapters, mix, tmp_path):
    words = ["--base", str(base_path), "--steps", "1", "--prompt", "a icon", "--device", "cpu"]
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["--adapter", said(mix), "--adapter", f"LoRA={adapters['LoRA']}@0.8"]
    main([*words, *given, "--output", str(first)])
    main(["--manifest", str(first), "--output", str(second), "--device", "cpu"])
    files = {file.name: file.read_bytes() for file in first.glob("*.png")}
    assert len(files) == 4 and files == {file.name: file.read_bytes() for file in second.glob("*.png")}
    stamp = read(first / "a_icon-seed0-mix.png")
    assert [scale for _, scale in stamp.mix] == [0.8, 0.5] and stamp.scale == 1
    assert f"Mix: {stamp.mix[0][0][:12]} x 0.8 + {stamp.mix[1][0][:12]} x 0.5" in parameters(stamp)
    assert read(first / "a_icon-seed0-lora_x_0.8.png").mix is None
    footer = json.loads((first / "manifest.json").read_text())["footer"]
    name = mix.parts[0][0].name
    assert f"mix = {name} x 0.8 + {name} x 0.5" in footer
    assert isinstance(Recipe.load(first).adapters["adapter_1"], Mix)
    other = said(Mix(((adapters["LoRA"], 0.8), (adapters["Flat-LoRA"], 0.6))))
    with pytest.raises(UserError, match="has a grid with other adapter files"):
        main([*words, "--adapter", other, *given[2:], "--output", str(first)])


def test_an_evaluation_measures_a_mix(base_path, icons, adapters, mix, tmp_path):
    plan = read_plan(
        {
            "base": str(base_path),
            "adapter": [parse_source(said(mix)), ("LoRA", adapters["LoRA"])],
            "heldout": icons,
            "instance_prompt": "a icon",
            "parts": ["losses"],
            "device": "cpu",
        }
    )
    report = evaluate(plan, tmp_path / "report")
    losses = {label: method["heldout"]["loss"] for label, method in report["methods"].items()}
    assert len(set(losses.values())) == 3
    assert report["settings"]["flatness"]["layers"] > 0


def test_the_engine_of_the_app_draws_it(pipeline, mix, base_path):
    studio = Studio(pipeline, "tiny", {"mix": mix})
    (drawn,) = (
        event for event in studio.run([Job("mix", [("a icon", 1)], DRAWING)]) if isinstance(event, Drawn)
    )
    other = load_pipeline(str(base_path))
    load_adapter(other, "mix", mix)
    expected = draw_with(other, "mix", "a icon", 1, DRAWING)
    assert np.array_equal(np.asarray(drawn.pictures[0]), np.asarray(expected))
    assert studio.stamp("mix", "a icon", 1, DRAWING).mix == studio.adapters["mix"].mixed


def test_one_that_cannot_be_loaded_leaves_nothing(pipeline, adapters, tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        load_adapter(pipeline, "mix", Mix(((adapters["LoRA"], 1.0), (tmp_path / "gone.safetensors", 1.0))))
    assert not pipeline.get_list_adapters()
    load_adapter(pipeline, "mix", adapters["LoRA"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a=x", ("a", Path("x"), 1.0)),
        ("a=x@0.5", ("a", Path("x"), 0.5)),
        ("a=x@0.5+y", ("a", Mix(((Path("x"), 0.5), (Path("y"), 1.0))), 1.0)),
        ("a=x@0.5+y@-1+x", ("a", Mix(((Path("x"), 0.5), (Path("y"), -1.0), (Path("x"), 1.0))), 1.0)),
        ("a=b+c", ("a", Path("b+c"), 1.0)),
    ],
)
def test_how_a_command_line_says_it(argument, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b+c").touch()
    assert parse_scaled(argument) == expected


@pytest.mark.parametrize("argument", ["a=x+", "a=x@+y", "a=x@nan+y", "a=@2+y"])
def test_what_is_no_mix_is_named(argument):
    with pytest.raises(argparse.ArgumentTypeError, match=r"several PATH@SCALE with \+ between them"):
        parse_source(argument)
