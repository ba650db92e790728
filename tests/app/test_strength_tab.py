"""The tab of all scales, and what can be taken home of it and of a comparison."""

import gradio as gr
import pytest
from PIL import Image

from flatlora_diffusion.app.comparison import Asked
from flatlora_diffusion.app.engine import Studio
from flatlora_diffusion.app.first import drawn_comparison
from flatlora_diffusion.app.keepsakes import keepsakes
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.app.strength_tab import SCALES, StrengthTab
from flatlora_diffusion.app.votes import VoteFile
from flatlora_diffusion.app.widgets import _common_beginning
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from tests.browser import served

pytest_plugins = ["tests.browser"]

DRAWING = Drawing(16, 16, 2, 3.0)


@pytest.fixture(scope="module")
def site(base_path, written_adapters, tmp_path_factory):
    studio = Studio(load_pipeline(str(base_path)), "tiny", written_adapters)
    votes = VoteFile(tmp_path_factory.mktemp("votes") / "votes.jsonl")
    return Site(studio, {"Unseen": ["a icon"]}, steps=2, guidance=3.0, votes=votes)


@pytest.fixture(scope="module")
def tab(site):
    with gr.Blocks():
        return StrengthTab(site)


def drawn(tab, *asked):
    shown = {}
    for update in tab._draw(*asked, 1.0, None):
        shown |= update
    return shown


def test_all_scales_are_drawn_once_and_the_slider_moves_through_them(
    tab, site, base_path, written_adapters, monkeypatch
):
    shown = drawn(tab, "a icon", 5)
    sweep = shown[tab.sweep]
    assert "Done" in shown[tab.status]
    assert {label: list(files) for label, files in sweep.files.items()} == {
        label: list(SCALES) for label in written_adapters
    }
    pipeline = load_pipeline(str(base_path))
    load_adapter(pipeline, "LoRA", written_adapters["LoRA"])
    for name, scale in ((None, 0.0), ("LoRA", 0.5)):
        with Image.open(sweep.files["LoRA"][scale]) as picture:
            alone = draw_with(pipeline, name, "a icon", 5, DRAWING, scale)
            assert picture.convert("RGB").tobytes() == alone.tobytes()
    assert sweep.files["LoRA"][0.0] == sweep.files["Flat-LoRA"][0.0]  # the base, drawn once
    for scale, nearest in ((0.5, 0.5), (0.6, 0.5), (1.5, 1.5)):
        shown_at = tab._show(sweep, scale)
        assert [picture.label for picture in shown_at] == [f"{label} x {nearest:g}" for label in sweep.files]
    for button, kind in ((tab.sheet, "PNG"), (tab.moving, "GIF")):
        with Image.open(shown[button].value["path"]) as picture:
            assert picture.format == kind
            assert kind == "PNG" or picture.n_frames == 2 * len(SCALES) - 2
    # Nothing is drawn a second time.
    monkeypatch.setattr("flatlora_diffusion.app.engine.draw_batch", None)
    again = drawn(tab, "a icon", 5)[tab.sweep]
    files = [own[0.75].read_bytes() for one in (sweep, again) for own in one.files.values()]
    assert files[:2] == files[2:]
    again.forget()
    assert not again.folder.exists() and sweep.folder.exists()


def test_wrong_values_are_refused_and_nothing_is_shown_before(tab):
    with pytest.raises(gr.Error, match="The prompt has 0 characters"):
        next(tab._draw(" ", 0, 1.0, None))
    assert tab._show(None, 1.0) == [gr.skip()] * 2


def test_a_comparison_can_be_taken_home(site):
    asked = Asked("a icon", 5, Drawing(16, 16, 2, 3.0, None, "default"), 1.0)
    comparison = drawn_comparison(site, asked, site.new_folder())
    still, moving = keepsakes(comparison, "LoRA", "Flat-LoRA")
    assert still.name == "lora-flat_lora-seed5-both.png"
    with Image.open(still) as sheet, Image.open(moving) as sliding:
        assert sheet.width > 2 * 192 and sliding.n_frames == 24
    made = moving.stat().st_mtime_ns
    assert keepsakes(comparison, "LoRA", "Flat-LoRA") == (still, moving)
    assert moving.stat().st_mtime_ns == made


@pytest.fixture(scope="module")
def address(site):
    with served(build(site), **launch_settings()) as url:
        yield url


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_the_slider_moves_and_files_are_taken_home(open_page, address, device):
    page = open_page(address, device)
    page.get_by_role("tab", name="Strength").click()
    page.locator("#strength-draw").click()
    page.locator("#strength-status", has_text="Done: move the slider.").wait_for()
    picture = page.locator("#strength-0 img")
    assert picture.get_attribute("alt") == '"a icon" drawn by LoRA at scale 1'
    page.locator("#strength-scale input[type=range]").press("ArrowRight")
    page.locator("#strength-0 img[alt$='at scale 1.25']").wait_for()
    for button, kind in (("sheet", "PNG"), ("gif", "GIF")):
        with page.expect_download() as waiting:
            page.locator(f"#strength-{button}").click()
        with Image.open(waiting.value.path()) as taken:
            assert taken.format == kind
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if device == "phone":  # no tab hides in a menu
        assert all(tab.is_visible() for tab in page.get_by_role("tab").all())
        assert page.get_by_role("tab").count() == 6


def test_words_that_all_prompts_share_are_told_once():
    beginning, endings = _common_beginning(["a 3d icon of red heart", "a 3d icon of cat"])
    assert (beginning, endings) == ("a 3d icon of", ["red heart", "cat"])
    for prompts in (
        ["a red icon", "a blue icon"],
        ["a 3d icon of cat"],
        ["an icon of", "an icon of cat"],
        [],
    ):
        assert _common_beginning(prompts) == ("", prompts)
