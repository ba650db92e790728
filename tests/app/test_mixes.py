"""A mix on the page: a field for the scale of each of its adapters, drawn, linked and told as it is set."""

from urllib.parse import parse_qs

import gradio as gr
import pytest

from flatlora_diffusion.adapter.mix import Mix
from flatlora_diffusion.app.compare_tab import CompareTab
from flatlora_diffusion.app.comparison import Asked
from flatlora_diffusion.app.engine import Job, Studio
from flatlora_diffusion.app.first import FirstComparison, drawn_comparison
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import read

DRAWING = Drawing(16, 16, 2, 3.0, None, "default")
GIVEN = ("a icon", "", 5, 2, 3.0, 1.0, "default", 16, 16)


@pytest.fixture(scope="module")
def site(base_path, written_adapters):
    parts = ((written_adapters["LoRA"], 0.8), (written_adapters["Flat-LoRA"], 0.5))
    adapters = {"mix": Mix(parts), "LoRA": written_adapters["LoRA"]}
    studio = Studio(load_pipeline(str(base_path)), "tiny", adapters)
    return Site(studio, {"Unseen": ["a icon"]}, steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def tab(site):
    with gr.Blocks() as page:
        yield CompareTab(site, page, FirstComparison(site))


def test_each_adapter_of_a_mix_has_a_field(tab):
    assert [(field.label, field.value) for field in tab._settings[9:]] == [
        ("mix: LoRA", 0.8),
        ("mix: Flat-LoRA", 0.5),
    ]
    assert tab._asked(*GIVEN).mixes == (("mix", (0.8, 0.5)),)  # a program that says nothing of them
    asked = tab._asked(*GIVEN, 0.3, -0.5)
    assert asked.mixes == (("mix", (0.3, -0.5)),) and asked.fields()[9:] == [0.3, -0.5]
    query = parse_qs(asked.link("mix", "LoRA")[1:])
    assert query["part1"] == ["0.3"] and query["part2"] == ["-0.5"] and query["scale"] == ["1"]
    for wrong in (2.5, None, float("nan")):
        with pytest.raises(gr.Error, match="The scale of an adapter in a mix must be a number"):
            tab._asked(*GIVEN, 0.3, wrong)


def test_a_mix_is_drawn_at_the_scales_that_are_set(site, base_path, written_adapters):
    other = Mix(((written_adapters["LoRA"], 0.3), (written_adapters["Flat-LoRA"], -0.5)))
    pipeline = load_pipeline(str(base_path))
    facts = load_adapter(pipeline, "other", other)
    asked = Asked("a icon", 5, DRAWING, 0.5, (("mix", (0.3, -0.5)),))
    comparison = drawn_comparison(site, asked, site.new_folder())
    (job,) = site.studio.run([Job("mix", [("a icon", 5)], DRAWING, 0.5, parts=(0.3, -0.5))])
    assert job.pictures[0].tobytes() == draw_with(pipeline, "other", "a icon", 5, DRAWING, 0.5).tobytes()
    stamp = read(comparison.files["mix"])
    assert stamp.mix == facts.mixed and stamp.adapter_sha256 == facts.sha256
    assert "scale 0.5 x (0.3 + -0.5)" in site.caption(*asked.made("mix"))
    assert "scale 0.5, hash" in site.caption(*asked.made("LoRA"))
    own = site.studio.run([Job("mix", [("a icon", 5)], DRAWING, 0.5)])
    assert [done.pictures[0].tobytes() for done in own] != [job.pictures[0].tobytes()]
