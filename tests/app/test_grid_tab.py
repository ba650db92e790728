"""The Grid tab: its sheet, what it refuses, and a browser's user."""

import dataclasses
import re
import zipfile
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from flatlora_diffusion.app.engine import Drawn, Job, Studio
from flatlora_diffusion.app.grid_tab import MAX_PICTURES, _seeds
from flatlora_diffusion.app.limits import MAX_PROMPT
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.draw.pipeline import Drawing, load_pipeline
from flatlora_diffusion.draw.stamp import BASE, read
from flatlora_diffusion.sheet.layout import contact_sheet
from tests.browser import served

pytest_plugins = ["tests.browser"]

DRAWING = Drawing(16, 16, 2, 3.0)
ASKED = {
    "prompts": "a icon\n\n  a red icon ",
    "seeds": "3, 4",
    "methods": ["base", "Flat-LoRA"],
    "scales": "0.5 1",
    "layout": "Prompts down, seeds and methods across",
    "negative_prompt": "",
    "steps": 2,
    "guidance": 3.0,
    "sampler": "default",
    "width": 16,
    "height": 16,
}


@pytest.fixture(scope="module")
def studio(base_path, written_adapters):
    return Studio(load_pipeline(str(base_path)), "tiny", written_adapters)


@pytest.fixture(scope="module")
def address(studio):
    presets = {"Unseen": ["a red icon"], "The base's own": ["an icon"]}
    with served(build(Site(studio, presets, steps=2, guidance=3.0)), **launch_settings()) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def drawn(studio, method, prompt, seed, scale=1.0):
    events = studio.run([Job(method, [(prompt, seed)], DRAWING, scale)])
    return next(event.pictures[0] for event in events if isinstance(event, Drawn))


@pytest.mark.slow
def test_a_program_gets_the_sheet_and_each_picture(client, studio):
    files, facts = client.predict(**ASKED, api_name="/grid")
    columns = [
        (seed, (f"seed {seed}", label), method, scale)
        for seed in (3, 4)
        for label, method, scale in [
            *(("base", BASE, 1.0), ("Flat-LoRA x 0.5", "Flat-LoRA", 0.5), ("Flat-LoRA x 1", "Flat-LoRA", 1.0))
        ]
    ]
    cells = [
        [drawn(studio, method, prompt, seed, scale) for seed, _, method, scale in columns]
        for prompt in ("a icon", "a red icon")
    ]
    sheet, *pictures = files
    flat = [cell for row in cells for cell in row]
    assert [Image.open(file).tobytes() for file in pictures] == [cell.tobytes() for cell in flat]
    made = [
        studio.stamp(method, prompt, seed, DRAWING, scale)
        for prompt in ("a icon", "a red icon")
        for seed, _, method, scale in columns
    ]
    assert [read(Path(file)) for file in pictures] == made
    assert [(own["prompt"], own["seed"], own["method"], own["scale"]) for own in facts] == [
        (own.prompt, own.seed, own.method, own.scale) for own in made
    ]
    footer = "tiny, 2 steps, guidance 3, Euler, 16 x 16 px, fp32; the same initial noise for each seed"
    expected = contact_sheet(
        cells,
        columns=[label for _, label, *_ in columns],
        rows=["a icon", "a red icon"],
        footer=footer,
    )
    with Image.open(sheet) as image:
        assert image.tobytes() == expected.tobytes()
        assert "Model: tiny" in image.info["parameters"]


@pytest.mark.slow
def test_steps_and_samplers_are_axes_too(client, studio):
    asked = {**ASKED, "prompts": "a icon", "seeds": "3", "methods": ["base"]}
    layout = "Prompts and seeds down, settings and methods across"
    more = {"several_steps": "1 2", "several_samplers": ["Euler", "DDIM"], "layout": layout}
    (sheet, *pictures), facts = client.predict(**{**asked, **more}, api_name="/grid")
    assert [(own["steps"], own["sampler"], own["guidance"]) for own in facts] == [
        (steps, sampler, 3.0) for steps in (1, 2) for sampler in ("Euler", "DDIM")
    ]
    for file, own in zip(pictures, facts, strict=True):
        drawing = dataclasses.replace(DRAWING, steps=own["steps"], sampler=own["sampler"])
        (job,) = studio.run([Job(BASE, [("a icon", 3)], drawing)])
        assert Image.open(file).tobytes() == job.pictures[0].tobytes()
    with Image.open(sheet) as image:
        assert "Steps: 1 2, Sampler: Euler / DDIM, CFG scale: 3," in image.info["parameters"]
        assert image.width > image.height


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompts": " \n "}, "There is no prompt; give at least one"),
        (
            {"prompts": "x" * (MAX_PROMPT + 1)},
            f"Each prompt must have at most {MAX_PROMPT} characters; one has",
        ),
        ({"prompts": "a\na"}, "Prompt a: is there twice"),
        ({"seeds": ""}, "Give at least one seed."),
        ({"seeds": "1 x"}, "x: a seed is a whole number from 0 to 4294967295, or a range as 0-7."),
        ({"seeds": "7-0"}, "7-0: a seed is"),
        ({"seeds": "0-"}, "0-: a seed is"),
        ({"seeds": "0-99999"}, "More than 60 seeds"),
        ({"seeds": "-1"}, "-1: a seed is a whole number from 0"),
        ({"seeds": "1.5"}, "1.5: a seed is a whole number from 0"),
        ({"seeds": "nan"}, "nan: a seed is a whole number from 0"),
        ({"seeds": "inf"}, "inf: a seed is a whole number from 0"),
        ({"seeds": "2 2"}, "Seed 2: is there twice"),
        ({"methods": []}, "There is no method"),
        ({"methods": ["../lora"]}, "not in the list of choices"),
        ({"layout": "sideways"}, "not in the list of choices"),
        ({"scales": "3"}, "The scale of the adapters must be a number from 0 to 2"),
        ({"scales": ""}, "Give at least one scale."),
        (
            {"seeds": " ".join(map(str, range(11)))},
            f"are 66 pictures; this page draws at most {MAX_PICTURES}",
        ),
        ({"width": 12}, "Width must be a multiple of 8"),
        ({"several_steps": "2 x"}, "Each number of steps must be a number, with spaces between them."),
        ({"several_steps": "2 1.5"}, "Steps must be a whole number from 1 to 100"),
        ({"several_steps": "2 2"}, "Steps 2: is there twice"),
        ({"several_guidances": "1 21"}, "Guidance must be a number from 0 to 20"),
        ({"several_samplers": ["../x"]}, "not in the list of choices"),
        (
            {"several_steps": "1 2 3 4 5", "several_guidances": "1 2"},
            "2 prompts, 2 seeds and 3 methods, 5 values of steps, 2 values of guidance are 120 pictures",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_starts(client, monkeypatch, wrong, told):
    def started(*arguments):
        raise AssertionError("it was drawn")

    monkeypatch.setattr(Studio, "run", started)
    asked = {**ASKED, "methods": ["Flat-LoRA"], "scales": "0.5 1 1.5"} if "seeds" in wrong else ASKED
    with pytest.raises(AppError, match=re.escape(told)):
        client.predict(**{**asked, **wrong}, api_name="/grid")


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_a_grid_is_drawn_and_downloaded(open_page, address, studio, device):
    page = open_page(address, device, dark=device == "phone")
    page.get_by_role("tab", name="Grid").click()
    assert page.locator("#grid-prompts textarea").input_value() == "a red icon\nan icon"
    page.locator("#grid-draw").click()
    page.locator("#grid-status", has_text="12 pictures are drawn.").wait_for()
    sheet = page.locator("#grid-sheet img")
    sheet.wait_for()
    alt = "A sheet of a red icon; an icon, drawn by base, LoRA, Flat-LoRA with seeds 0, 1"
    assert sheet.get_attribute("alt") == alt
    page.locator("#grid-pictures img").nth(11).wait_for(state="attached")
    with page.expect_download() as waiting:
        page.locator("#grid-download").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        names = archive.namelist()
        assert len(names) == 13 and "sheet.png" in names
        made = read(archive.read("an_icon-seed1-flat_lora.png"))
        assert made == studio.stamp("Flat-LoRA", "an icon", 1, DRAWING)
        assert archive.read("sheet.png") == httpx.get(sheet.get_attribute("src")).content
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_grid_is_stopped(open_page, address):
    page = open_page(address)
    page.get_by_role("tab", name="Grid").click()
    page.get_by_text("More settings").locator("visible=true").click()
    page.get_by_label("number input for Denoising steps").locator("visible=true").fill("100")
    page.locator("#grid-draw").click()
    page.locator("#grid-status", has_text="pictures: about").wait_for()
    page.locator("#grid-stop").click()
    page.locator("#grid-status", has_text="Stopped.").wait_for()


def test_a_grid_that_is_too_large_is_refused_in_words(open_page, address):
    page = open_page(address)
    page.get_by_role("tab", name="Grid").click()
    page.locator("#grid-seeds input, #grid-seeds textarea").fill(" ".join(map(str, range(40))))
    page.locator("#grid-draw").click()
    page.get_by_text("2 prompts, 40 seeds and 3 methods are 240 pictures").wait_for()


def test_seeds_come_in_ranges_too():
    assert _seeds("0-3, 7 9-9") == [0, 1, 2, 3, 7, 9]
    assert _seeds("4294967295") == [4294967295]
