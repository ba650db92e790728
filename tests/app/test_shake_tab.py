"""The tab that shakes weights: what it draws, and what it says of it."""

import gradio as gr
import pytest

from flatlora_diffusion.adapter.mix import Mix
from flatlora_diffusion.app.engine import Job, Studio
from flatlora_diffusion.app.measured import Measured
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.shake_tab import ShakeTab, moved_text
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from tests.browser import served

pytest_plugins = ["tests.browser"]

ADDED = ("Flat-LoRA", 0.5)  # what is added where that is asked for


@pytest.fixture(scope="module")
def tab(base_path, written_adapters):
    studio = Studio(load_pipeline(str(base_path)), "tiny", written_adapters)
    with gr.Blocks():
        return ShakeTab(Site(studio, {"Unseen": ["a icon"]}, steps=2, guidance=3.0))


def shaken(tab, *asked):
    shown = {}
    for update in tab._shake(*asked, *ADDED):
        shown |= update
    return shown


@pytest.mark.slow
def test_each_method_is_drawn_calm_and_shaken(tab):
    shown = shaken(tab, "a icon", 5, "Random noise", 0.3, 0)
    assert "Done." in shown[tab.status]
    for method in tab._methods:
        assert "sigma 0.3: changed by " in shown[tab.captions[method]]
    still = shaken(tab, "a icon", 5, "Random noise", 0.0, 0)
    assert "The methods hardly differ" in still[tab.told]
    rounded = shaken(tab, "a icon", 5, "Rounded to 3 bits", 0.3, 0)
    assert "3 bits: changed by " in rounded[tab.captions["base"]]


def test_another_adapter_is_added_to_each_method(tab, written_adapters):
    shown = shaken(tab, "a icon", 5, "Another adapter added", 0.3, 0)
    assert "Flat-LoRA x 0.5 added: changed by " in shown[tab.captions["LoRA"]]
    drawing = Drawing(16, 16, 2, 3.0, None, "default")
    studio = tab._site.studio
    # To the base it is itself, to itself more of it, and to another a mix.
    mix = Mix(((written_adapters["LoRA"], 1.0), (written_adapters["Flat-LoRA"], 0.5)))
    pipeline = studio._pipeline
    load_adapter(pipeline, "both", mix)
    for method, name, scale in (
        ("base", "adapter_2", 0.5),
        ("Flat-LoRA", "adapter_2", 1.5),
        ("LoRA", "both", 1.0),
    ):
        expected = draw_with(pipeline, name, "a icon", 5, drawing, scale)
        *_, job = studio.run([Job(method, [("a icon", 5)], drawing, added=("Flat-LoRA", 0.5))])
        assert job.pictures[0].tobytes() == expected.tobytes(), method
    *_, again = studio.run([Job("LoRA", [("a icon", 6)], drawing)])
    assert again.pictures[0].tobytes() == draw_with(pipeline, "adapter_1", "a icon", 6, drawing).tobytes()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("", 5, "Random noise", 0.2, 0), "The prompt has 0 characters"),
        (("a", 5, "Random noise", 0.6, 0), "Sigma must be a number from 0 to 0.5."),
        (("a", 5, "Random noise", None, 0), "Sigma must be a number from 0 to 0.5."),
        (("a", 5, "Hammered", 0.2, 0), "The weights are shaken in one of these ways"),
        (("a", 5, "Random noise", 0.2, 1.5), "The number of the noise must be a whole number from 0 to"),
        (("a", -1, "Random noise", 0.2, 0), "The seed must be a whole number from 0 to"),
    ],
)
def test_wrong_values_are_refused(tab, asked, told):
    with pytest.raises(gr.Error) as refused:
        next(tab._shake(*asked, *ADDED))
    assert told in refused.value.message


@pytest.fixture(scope="module")
def address(tab):
    rises = {method: [(0.1, 0.2), (0.3, 2.0)] for method in tab._methods}
    site = Site(
        tab._site.studio, {"Unseen": ["a icon"]}, steps=2, guidance=3.0, measured=Measured(rises=rises)
    )
    with served(build(site), **launch_settings()) as url:
        yield url


@pytest.mark.parametrize(("device", "dark"), [("desktop", True), ("phone", False)])
def test_it_is_used_in_a_browser(open_page, address, device, dark):
    page = open_page(f"{address}#shake", device, dark=dark)
    page.get_by_role("tab", name="Shake test").click()
    captions = page.locator("#shake-results .caption p")
    page.locator("#shake-draw").click()
    page.locator("#shake-status", has_text="Done.").wait_for()
    assert captions.all_inner_texts()[0].startswith("sigma 0.2: changed by ")
    assert page.locator("#shake-results .picture img").count() == 6
    # On a phone the button is below the results: they come into sight.
    page.wait_for_function(
        "() => { const box = document.getElementById('shaken-0').getBoundingClientRect();"
        " return box.bottom > 0 && box.top < innerHeight; }"
    )
    sides = [page.locator(f"#{name}-1").bounding_box() for name in ("calm", "shaken")]
    assert sides[0]["x"] == sides[1]["x"] and sides[0]["y"] < sides[1]["y"]  # above each other
    page.get_by_label("Another adapter added").check()
    page.locator("#shake-told", has_text="LoRA x 0.5 added").wait_for()
    page.locator("#shake-times").wait_for()
    assert not page.locator("#shake-sigma").is_visible()
    assert (
        page.locator("#shake-rise").is_visible()
        and page.locator("#shake-rise").bounding_box()["height"] > 200
    )
    page.get_by_label("Rounded to 8 bits").check()
    page.locator("#shake-told", has_text="8 bits").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_claims_no_more_than_it_saw():
    told = moved_text({"base": 9.0, "LoRA": 5.0, "Flat-LoRA": 3.0}, "sigma 0.2")
    assert "<strong>Flat-LoRA held best</strong> here" in told
    assert "Flat-LoRA 3.0%, LoRA 5.0%, base 9.0%" in told and "One prompt and one draw say little" in told
    assert "hardly differ" in moved_text({"LoRA": 5.0, "Flat-LoRA": 5.4}, "4 bits")
