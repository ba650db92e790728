"""The Compare tab: what a program, a crowd, an attacker and a browser's user get."""

import io
import json
import re
import threading
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect

from flatlora_diffusion.app.comparison import Asked
from flatlora_diffusion.app.engine import Studio
from flatlora_diffusion.app.first import FirstComparison, drawn_comparison
from flatlora_diffusion.app.limits import MAX_PROMPT
from flatlora_diffusion.app.measured import Measured
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.references import Example, References
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.app.votes import VoteFile
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import read, sidecar
from tests.browser import served

pytest_plugins = ["tests.browser"]

ASKED = {
    "prompt": "a icon",
    "negative_prompt": "",
    "seed": 5,
    "steps": 2,
    "guidance": 3.0,
    "scale": 1.0,
    "sampler": "default",
    "width": 16,
    "height": 16,
}
DRAWING = Drawing(16, 16, 2, 3.0)
PRESETS = {"Unseen": ["a red icon", "a blue icon"], "The base's own": ["an icon"]}


@pytest.fixture(scope="module")
def studio(base_path, written_adapters):
    return Studio(load_pipeline(str(base_path)), "tiny", written_adapters)


@pytest.fixture(scope="module")
def site(studio):
    return Site(studio, PRESETS, steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def address(site):
    with served(build(site), **launch_settings()) as url:
        yield url


@pytest.fixture(scope="module")
def opened(studio, tmp_path_factory):
    """A page with all that there can be on it, that opens with a comparison; and that."""
    folder = tmp_path_factory.mktemp("icons")
    icons = [Example(f"icon {number}", folder / f"{number}.png") for number in range(23)]
    for icon in icons:
        Image.new("RGB", (16, 16), "red").save(icon.file)
    own = Site(
        studio,
        PRESETS,
        steps=2,
        guidance=3.0,
        votes=VoteFile(folder / "votes.jsonl"),
        references=References(icons, subject="a icon"),
        measured=Measured({"LoRA": 0.1, "Flat-LoRA": 0.0995}),
    )
    first = FirstComparison(own)
    folder = own.new_folder()
    drawing = Drawing(16, 16, 2, 3.0, None, "default")
    first.ready = drawn_comparison(own, Asked("a red icon", 0, drawing, 1.0), folder)
    with served(build(own, first), **launch_settings()) as url:
        yield url, first


def kept(site):
    """The folders with files that were handed out."""
    return sorted(site.new_folder().parent.glob("*/*"))


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def lone(base_path, written_adapters):
    """The pictures of a request that nobody disturbs, in the order of the methods."""
    pipeline = load_pipeline(str(base_path))
    for label, path in written_adapters.items():
        load_adapter(pipeline, label, path)

    def draw(prompt, seed, drawing=DRAWING, scale=1.0):
        return [
            draw_with(pipeline, adapter, prompt, seed, drawing, scale).tobytes()
            for adapter in (None, *written_adapters)
        ]

    return draw


def pixels(files):
    return [Image.open(file).convert("RGB").tobytes() for file in files]


@pytest.mark.slow
def test_a_program_gets_the_pictures_of_a_lone_request_and_what_made_them(client, site, studio, lone):
    before = kept(site)
    asked = {
        **ASKED,
        "negative_prompt": "blue",
        "height": 24,
        "sampler": "DDIM",
        "scale": 0.5,
    }
    files, facts = client.predict(**asked, api_name="/compare")
    drawing = Drawing(16, 24, 2, 3.0, "blue", "DDIM")
    assert pixels(files) == lone("a icon", 5, drawing, 0.5)
    assert [Path(file).name for file in files] == ["base-seed5.png", "lora-seed5.png", "flat_lora-seed5.png"]
    for file, method in zip(files, studio.methods, strict=True):
        made = studio.stamp(method, "a icon", 5, drawing, 0.5)
        assert read(Path(file)) == made
        assert facts[method].pop("seconds") > 0
        assert facts[method] == json.loads(sidecar(made))
    assert kept(site) == before
    described = client.predict(api_name="/methods")
    assert list(described) == list(studio.methods) and described["base"] == {"name": "tiny"}
    assert described["LoRA"]["sha256"] == studio.adapters["LoRA"].sha256
    assert described["LoRA"]["rank"] == "4" and described["LoRA"]["alpha"] == "8"


def test_the_names_of_the_interface_are_stable(client):
    interface = client.view_api(return_format="dict")
    assert sorted(interface["named_endpoints"]) == ["/compare", "/grid", "/methods", "/training_run"]
    assert not interface["unnamed_endpoints"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompt": "  "}, f"The prompt has 0 characters; it must have 1 to {MAX_PROMPT}."),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, f"The prompt has {MAX_PROMPT + 1} characters; it must have"),
        ({"negative_prompt": "x" * (MAX_PROMPT + 1)}, "The negative prompt has 1001 characters; it must"),
        ({"prompt": None}, "Prompt must be text."),
        ({"prompt": ["a icon"]}, "Prompt must be text."),
        ({"prompt": 3}, "Prompt must be text."),
        ({"negative_prompt": {"a": 1}}, "Negative prompt must be text."),
        ({"seed": -1}, "less than minimum"),
        ({"seed": 2**32}, "greater than maximum"),
        ({"seed": None}, "The seed must be a whole number from 0 to 4294967295."),
        ({"seed": 1.5}, "The seed must be a whole number from 0 to 4294967295."),
        ({"seed": "5"}, "Seed must be a number."),
        ({"seed": [5]}, "Seed must be a number."),
        ({"steps": None}, "Denoising steps must be a number."),
        ({"steps": "two"}, "Denoising steps must be a number."),
        ({"guidance": True}, "Guidance must be a number."),
        ({"scale": {}}, "Scale of the adapters must be a number."),
        ({"sampler": None}, "Sampler must be text."),
        ({"sampler": ["default"]}, "Sampler must be text."),
        ({"steps": 0}, "Denoising steps: Value 0 is less than minimum"),
        ({"steps": 101}, "greater than maximum"),
        ({"steps": 2.5}, "Steps must be a whole number from 1 to 100"),
        ({"guidance": 20.5}, "greater than maximum"),
        ({"scale": 3}, "greater than maximum"),
        ({"width": 10_000}, "greater than maximum"),
        ({"height": 17}, "Height must be a multiple of 8 from 8 to 24"),
        ({"sampler": "../../etc/passwd"}, "not in the list of choices"),
    ],
)
def test_what_is_out_of_its_limits_is_refused(client, wrong, told, capfd):
    with pytest.raises(AppError, match=re.escape(told)):
        client.predict(**{**ASKED, **wrong}, api_name="/compare")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [None, "text", 3, ["nobody"], [None], {"a": 1}])
def test_a_grid_of_wrong_values_is_refused_in_a_line(client, wrong, capfd):
    with pytest.raises(AppError, match=r"Methods must be a list|is not in the list of choices"):
        client.predict("a icon", "0", wrong, "1", api_name="/grid")
    assert "Traceback" not in capfd.readouterr().err


def test_only_what_draws_waits_in_the_queue(site):
    """With a full queue a page still opens, with its link and its runs."""
    events = build(site).fns.values()
    waiting = [event for event in events if event.queue and event.fn]
    assert {event.concurrency_id for event in waiting} == {"pipeline"}, [event.name for event in waiting]


@pytest.mark.slow
def test_fifty_requests_at_once_each_get_their_own_pictures_or_a_clean_refusal(address, lone):
    clients = [Client(address, verbose=False) for _ in range(2)]
    answers, refusals = {}, []

    def ask(seed):
        try:
            files, _ = clients[seed % 2].predict(**{**ASKED, "seed": seed, "steps": 1}, api_name="/compare")
            answers[seed] = pixels(files)
        except Exception as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refusals) == 50 and len(answers) >= 8
    assert all("queue is full" in told.lower() for told in refusals), refusals
    for seed, drawn in answers.items():
        assert drawn == lone("a icon", seed, Drawing(16, 16, 1, 3.0))


@pytest.mark.parametrize("route", ["run/compare", "run/predict", "api/compare"])
def test_nobody_gets_past_the_queue(address, route):
    events = httpx.get(f"{address}config").json()["dependencies"]
    number = next(event["id"] for event in events if event["api_name"] == "compare")
    body = {"data": list(ASKED.values()), "fn_index": number}
    answer = httpx.post(f"{address}gradio_api/{route}", json=body)
    assert answer.status_code in (403, 404, 405) or "queue" in answer.text.lower()
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=pyproject.toml",
        "gradio_api/file=app.py",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/file=assets/adapters/lora/pytorch_lora_weights.safetensors",
        "static/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/proxy=http://127.0.0.1:1/",
        "monitoring",
    ],
)
def test_no_file_of_the_computer_is_served(address, path):
    answer = httpx.get(address + path)
    assert answer.status_code in (400, 403, 404, 422), answer.text[:200]
    assert "root:" not in answer.text and "flatlora_diffusion" not in answer.text


def test_nothing_is_uploaded(address):
    files = {"files": ("small.bin", io.BytesIO(bytes(2)))}
    assert httpx.post(f"{address}gradio_api/upload", files=files).status_code == 403


def test_a_method_that_is_not_there_is_refused(address, client):
    """Whoever forges the page's own requests gets no further than the page."""
    configuration = httpx.get(f"{address}config").json()
    labels = {part["id"]: part["props"].get("label") for part in configuration["components"]}
    asked = [[labels[part] for part in event["inputs"]] for event in configuration["dependencies"]]
    number = asked.index([None, "Left side", "Right side"])
    body = {"data": [None, "/etc/passwd", "../lora"], "fn_index": number, "session_hash": "forged"}
    httpx.post(f"{address}gradio_api/queue/join", json=body).raise_for_status()
    told = httpx.get(f"{address}gradio_api/queue/data", params={"session_hash": "forged"}, timeout=30).text
    assert "not in the list of choices" in told and "root:" not in told


# In a browser.


IN_SIGHT = """(id) => {
    const box = document.getElementById(id).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
}"""


def compare(page, seed=5):
    page.locator("#seed input").fill(str(seed))
    page.locator("#compare").click()
    page.locator("#status", has_text="Done").wait_for()


def shown(page, selector):
    """The pixels of a picture on the page, as the server sent them."""
    source = page.locator(f"{selector} img").first.get_attribute("src")
    return Image.open(io.BytesIO(httpx.get(source).content))


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_a_prompt_is_typed_compared_and_looked_at(open_page, address, lone, device):
    page = open_page(address, device)
    page.locator("#prompt textarea").fill("a red icon")
    compare(page)
    assert page.evaluate(IN_SIGHT, "slider")  # on a phone the button is below it
    expected = lone("a red icon", 5)
    pictures = page.locator("#pictures .picture img")
    sources = [pictures.nth(index).get_attribute("src") for index in range(3)]
    assert pixels(io.BytesIO(httpx.get(source).content) for source in sources) == expected
    assert pictures.nth(1).get_attribute("alt") == '"a red icon" drawn by LoRA with seed 5'
    assert pictures.nth(1).bounding_box()["width"] >= 150  # of 16 pixels
    assert "pixelated" in pictures.nth(1).evaluate("image => getComputedStyle(image).imageRendering")
    sides = page.locator("#slider img")
    assert [
        pixels([io.BytesIO(httpx.get(sides.nth(i).get_attribute("src")).content)])[0] for i in (0, 1)
    ] == (expected[1:])
    one, other = (np.frombuffer(drawn, np.uint8).astype(float) for drawn in expected[1:])
    percent = np.abs(one - other).mean() / 2.55
    told = page.locator("#figure").inner_text()
    assert told.startswith("LoRA and Flat-LoRA ") and f"colours are {percent:.1f}% of the full range" in told
    assert page.locator(".stage-prompt").inner_text() == "“a red icon”, seed\xa05"
    assert page.locator("#pictures .caption").nth(1).inner_text().startswith("a red icon")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_one_divider_is_dragged_and_moved_by_keys(open_page, address, device):
    page = open_page(address, device)
    compare(page)
    divider, right = page.locator("#slider input"), page.locator("#slider img.right")

    def cut():
        found = re.search(r"([\d.]+)%\)$", right.evaluate("image => getComputedStyle(image).clipPath"))
        return float(found[1])

    assert cut() == 50 and page.locator("#divider").count() == 0
    page.locator("#slider").scroll_into_view_if_needed()
    box = page.locator(".stage-box").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 50, steps=5)
    page.mouse.up()
    assert cut() == pytest.approx(80, abs=4)  # a range input keeps half of its thumb inside
    divider.press("Home")
    divider.press("ArrowRight")
    assert cut() == 1
    picture = page.locator("#slider img.left").bounding_box()
    assert picture == pytest.approx(box) and picture["width"] == pytest.approx(picture["height"], abs=1)
    page.get_by_label("Full screen").click()
    page.wait_for_function("document.fullscreenElement")
    labels = [label.bounding_box() for label in page.locator(".stage-label").all()]
    assert labels[0]["x"] < labels[1]["x"] and page.locator(".stage-label").first.is_visible()
    page.evaluate("document.exitFullscreen()")


def test_other_sides_are_chosen(open_page, address, lone):
    page = open_page(address)
    compare(page)
    page.get_by_label("Left side").click()
    page.get_by_role("option", name="base").click()
    page.locator("#slider img[alt='Left: base']").wait_for()
    assert shown(page, "#slider").convert("RGB").tobytes() == lone("a red icon", 5)[0]
    page.locator("#figure", has_text="base and Flat-LoRA ").wait_for()
    assert page.locator(".stage-label").all_inner_texts() == ["base", "Flat-LoRA"]
    assert "left=base" in page.url
    page.get_by_label("Left side").click()
    page.get_by_role("option", name="Flat-LoRA").click()
    page.locator("#figure", has_text="Both sides are Flat-LoRA: choose another one for a side.").wait_for()


def test_stopping_is_at_once_and_leaves_the_pipeline_sound(open_page, address, site, lone):
    before = kept(site)
    page = open_page(address)
    page.get_by_text("More settings").click()
    page.get_by_label("number input for Denoising steps").fill("100")
    page.locator("#compare").click()
    page.locator("#status progress").wait_for()
    page.locator("#stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    page.wait_for_timeout(500)
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]
    assert kept(site) == before
    page.get_by_label("number input for Denoising steps").fill("2")
    compare(page)
    assert shown(page, "#slider").convert("RGB").tobytes() == lone("a red icon", 5)[1]
    # What was there before a drawing that is stopped comes back whole.
    link = page.url
    page.locator("#seed input").fill("6")
    page.get_by_label("number input for Denoising steps").fill("100")
    page.locator("#compare").click()
    page.locator("#status progress").wait_for()
    page.locator("#stop").click()
    page.locator("#status", has_text="Stopped. The last comparison is shown again.").wait_for()
    page.wait_for_timeout(500)
    sides = [source.get_attribute("src") for source in page.locator("#slider img").all()]
    assert pixels(io.BytesIO(httpx.get(source).content) for source in sides) == lone("a red icon", 5)[1:]
    assert page.url == link == page.locator("#link textarea, #link input").first.input_value()
    assert page.locator("#download").is_enabled() and not page.locator("#pictures [data-old]").count()


def test_a_link_reproduces_a_comparison(open_page, address, lone):
    page = open_page(address)
    page.locator("#prompt textarea").fill("a blue, icon & more: ä")
    page.get_by_label("Left side").click()
    page.get_by_role("option", name="base").click()
    compare(page, 77)
    field = page.locator("#link textarea, #link input").first
    expect(field).to_have_value(page.url)  # the page makes the server's link a whole one
    assert page.url.startswith(f"{address}?")
    other = open_page(page.url)
    other.locator("#status", has_text="Done").wait_for()
    assert other.locator("#prompt textarea").input_value() == "a blue, icon & more: ä"
    assert other.locator("#seed input").input_value() == "77"
    drawn = shown(other, "#slider").convert("RGB").tobytes()
    assert drawn == shown(page, "#slider").convert("RGB").tobytes() == lone("a blue, icon & more: ä", 77)[0]


def test_bad_links_change_nothing(open_page, address):
    page = open_page(f"{address}?prompt={'x' * 2000}&seed=-3&steps=nan&sampler=none&left=%2Fetc%2Fpasswd")
    page.get_by_text(
        "Left out of the link, for this page has no such: prompt, seed, steps, sampler, left."
    ).wait_for()
    assert page.locator("#prompt textarea").input_value() == "a red icon"
    assert page.locator("#seed input").input_value() == "0"


def test_a_random_seed_is_written_back_and_presets_run(open_page, address):
    page = open_page(address)
    page.locator("#random").click()
    page.wait_for_function("document.querySelector('#seed input').value !== '0'")
    assert 0 < int(page.locator("#seed input").input_value()) < 2**32
    page.get_by_text("a blue icon").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a blue icon'")
    page.locator(".stage-prompt", has_text="“a blue icon”").wait_for()


def test_everything_is_reached_and_done_with_the_keyboard(open_page, address):
    page = open_page(address)
    prompt = page.locator("#prompt textarea")
    prompt.focus()
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert {"compare", "stop", "random"} <= set(reached), reached
    page.locator("#compare").focus()
    page.keyboard.press("Enter")
    page.locator("#status", has_text="Done").wait_for()


def test_the_archive_has_pictures_and_settings(open_page, address, studio):
    page = open_page(address)
    compare(page)
    with page.expect_download() as waiting:
        page.locator("#download").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        names = [
            f"{method}-seed5.{kind}" for method in ("base", "flat_lora", "lora") for kind in ("json", "png")
        ]
        assert archive.namelist() == names
        made = studio.stamp("Flat-LoRA", "a red icon", 5, DRAWING)
        assert read(archive.read("flat_lora-seed5.png")) == made
        assert archive.read("flat_lora-seed5.json") == sidecar(made)
    with page.expect_download() as waiting:
        page.get_by_label("Download").nth(1).click()
    assert read(Path(waiting.value.path())) == studio.stamp("LoRA", "a red icon", 5, DRAWING)


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_it_opens_with_a_comparison_and_goes_back_to_others(open_page, opened, lone, device):
    address, _ = opened
    page = open_page(address, device)
    page.locator("#slider img[src]").nth(1).wait_for()
    sides = [source.get_attribute("src") for source in page.locator("#slider img").all()]
    assert pixels(io.BytesIO(httpx.get(source).content) for source in sides) == lone("a red icon", 0)[1:]
    top = page.locator("#slider").bounding_box()
    assert top["y"] + 200 < page.viewport_size["height"]  # in sight, also on a phone
    page.wait_for_function("location.search.includes('seed=0')")
    page.reload()
    page.locator("#status", has_text="drawn beforehand.").wait_for()
    page.locator("#sliding[href], #sliding:not([disabled]), a:has(#sliding)").first.wait_for()
    page.wait_for_timeout(500)
    assert page.locator("#status progress").count() == 0  # nothing is drawn again
    # Dimmed as soon as the settings are others, and bright again when they come back.
    note = page.locator(".stage-note")
    page.locator("#seed input").fill("9")
    note.get_by_text("press Compare").wait_for()
    assert "opacity" in page.locator("#slider img").first.evaluate("img => getComputedStyle(img).filter")
    page.locator("#seed input").fill("0")
    page.wait_for_function("!document.querySelector('.stage-note').textContent")
    # Enter compares, Shift+Enter doesn't.
    prompt = page.locator("#prompt textarea")
    prompt.fill("a blue")
    prompt.press("Shift+Enter")
    prompt.type("icon")
    assert prompt.input_value() == "a blue\nicon" and page.locator("#status progress").count() == 0
    prompt.fill("a blue icon")
    prompt.press("Enter")
    page.locator("#status", has_text="Done").wait_for()
    # The last results can be shown again, with their settings.
    page.locator("#strip button.thumbnail-item, #strip .thumbnail-item").nth(1).click()
    page.locator("#status", has_text="Shown again.").wait_for()
    page.locator(".stage-prompt", has_text="“a red icon”, seed 0").wait_for()
    assert prompt.input_value() == "a red icon" and not note.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_what_matters_is_in_sight_at_once(open_page, opened, device):
    page = open_page(opened[0], device)
    page.locator(".stage:not(.empty)").wait_for()
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    if device == "desktop":
        height = 800
        page.set_viewport_size({"width": width, "height": height})
    tabs = page.locator("[role=tab]:visible").all_inner_texts()
    assert tabs == ["Compare", "Shake test", "Strength", "Grid", "Blind test", "Training"]
    for name in ("#taught img >> nth=22", ".stage-box", ".stage-prompt", "#prompt textarea"):
        box = page.locator(name).bounding_box()
        seen = min(box["y"] + box["height"], box["y"] + 16 if "textarea" in name else height)
        assert box["x"] + box["width"] <= width and seen <= height, name
    # Each half has its name right above it, wherever the line is.
    bands = [label.bounding_box() for label in page.locator(".stage-label").all()]
    line = page.locator(".stage-line").bounding_box()
    middle = line["x"] + line["width"] / 2
    assert bands[0]["x"] + bands[0]["width"] == pytest.approx(middle, abs=1)
    assert bands[1]["x"] == pytest.approx(middle, abs=1)
    page.locator("#prompt", has_text="“a icon” names the taught style.").wait_for()
    page.get_by_text("Click one of these to draw it at once").first.wait_for()
    link = page.locator("#verdict a")
    assert "underline" in link.evaluate("link => getComputedStyle(link).textDecorationLine")
    link.click()
    page.wait_for_function("document.querySelector('#tab-blind-button')?.ariaSelected === 'true'")
    assert "seed=0" in page.url and page.url.endswith("#blind")  # not loaded again


def test_tabs_have_links_and_go_back(open_page, address):
    page = open_page(f"{address}#grid")  # the page's own mark comes before the tab's
    chosen = page.locator("[role=tab][aria-selected=true]")
    page.goto(f"{address}#grid")
    page.wait_for_function("document.querySelector('#tab-grid-button')?.ariaSelected === 'true'")
    page.locator("#tab-runs-button").click()
    assert page.url.endswith("#runs")
    page.reload()
    page.wait_for_function("document.querySelector('#tab-runs-button')?.ariaSelected === 'true'")
    page.go_back()
    page.wait_for_function("document.querySelector('#tab-grid-button')?.ariaSelected === 'true'")
    assert chosen.inner_text() == "Grid"


def test_a_server_that_has_gone_is_told(open_page, address):
    page = open_page(address)
    page.clock.install()
    page.route("**/app_id", lambda route: route.fulfill(json={"app_id": 1}))
    page.evaluate("window.flatlora.ask()")
    page.route("**/app_id", lambda route: route.fulfill(json={"app_id": 2}))
    page.evaluate("window.flatlora.ask()")
    page.get_by_role("alert").get_by_text("was started anew").wait_for()
    page.route("**/app_id", lambda route: route.abort("aborted"))
    for _ in range(2):
        page.evaluate("window.flatlora.ask()")
    page.get_by_role("alert").get_by_text("The app does not answer").wait_for()


def test_what_is_told_to_other_sites_is_our_own(address):
    metas = re.findall(
        r'<meta\s+(?:property|name)="((?:og|twitter):\w+)"\s+content="([^"]*)"', httpx.get(address).text
    )
    told = dict(metas)
    assert told["og:title"] == "Flat-LoRA beside LoRA" and told["og:url"] == address
    assert told["og:image"] == f"{address}favicon.ico" and "gradio" not in str(metas).lower()
    icon = httpx.get(f"{address}favicon.ico")
    assert Image.open(io.BytesIO(icon.content)).size == (128, 128)
