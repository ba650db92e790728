"""The blind test: nothing tells the methods before the vote, and each pair gets one."""

import dataclasses
import io
import json
import re
import secrets
import struct
import threading
import types

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from flatlora_diffusion.app import blind_tab, engine
from flatlora_diffusion.app.__main__ import main
from flatlora_diffusion.app.blind_tab import shuffled
from flatlora_diffusion.app.engine import Studio
from flatlora_diffusion.app.frames import Frames
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.app.tally import chance, tally_html
from flatlora_diffusion.app.votes import TIE, Tally, Vote, VoteFile
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import read
from tests.browser import served

pytest_plugins = ["tests.browser"]

DRAWING = Drawing(16, 16, 2, 3.0)
PRESETS = {"Unseen": ["a red icon", "a blue icon"], "The base's own": ["an icon"]}
METHODS = ("LoRA", "Flat-LoRA")


@pytest.fixture(scope="module")
def studio(base_path, written_adapters):
    return Studio(load_pipeline(str(base_path)), "tiny", written_adapters)


@pytest.fixture(scope="module")
def votes_path(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def address(studio, votes_path):
    page = build(Site(studio, PRESETS, steps=2, guidance=3.0, votes=VoteFile(votes_path)))
    with served(page, **launch_settings()) as url:
        yield url


@pytest.fixture
def votes(votes_path):
    """The file, without votes of other tests."""
    votes_path.unlink(missing_ok=True)
    return VoteFile(votes_path)


@pytest.fixture(scope="module")
def lone(base_path, written_adapters):
    """The picture of a method when nothing else is drawn."""
    pipeline = load_pipeline(str(base_path))
    for label, path in written_adapters.items():
        load_adapter(pipeline, label, path)

    def draw(method, prompt, seed):
        return draw_with(pipeline, None if method == "base" else method, prompt, seed, DRAWING).tobytes()

    return draw


@pytest.fixture(scope="module")
def visitor(address):
    """Sends what the page's buttons send; every visit is a new one."""
    configuration = httpx.get(f"{address}config").json()
    names = {part["id"]: part["props"].get("elem_id") for part in configuration["components"]}
    events = {
        names.get(target): event["id"]
        for event in configuration["dependencies"]
        for target, _ in event["targets"]
    }

    class Visitor:
        def __init__(self):
            self.session = secrets.token_hex(8)

        def draw(self, prompt="a icon", one="LoRA", other="Flat-LoRA"):
            """All that the server sends until the pair is there."""
            body = self.body("blind-draw", [prompt, one, other, None])
            httpx.post(f"{address}gradio_api/queue/join", json=body).raise_for_status()
            return httpx.get(
                f"{address}gradio_api/queue/data", params={"session_hash": self.session}, timeout=30
            ).text

        def vote(self, choice):
            return httpx.post(
                f"{address}gradio_api/run/predict", json=self.body(f"blind-{choice}", [None]), timeout=30
            )

        def body(self, button, data):
            return {"data": data, "fn_index": events[button], "session_hash": self.session}

    return Visitor


def fixed(seed, order):
    """Chance that is none."""
    return types.SimpleNamespace(randbelow=lambda _: seed, randbits=lambda _: order, choice=secrets.choice)


def sent_pictures(text):
    """Addresses of the left and of the right picture."""
    return list(dict.fromkeys(re.findall(r'"url":"([^"]+)"', text)))


def pixels(url):
    return Image.open(io.BytesIO(httpx.get(url).content)).convert("RGB").tobytes()


def chunks(png):
    """Names of a PNG's chunks."""
    names, at = [], 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        names.append(name.decode())
        at += 12 + length
    return names


def says_nothing(text, studio):
    hashes = [adapter.sha256[:8] for adapter in studio.adapters.values()]
    return not [word for word in ("lora", *hashes) if word in text.lower()]


@pytest.mark.slow
def test_what_is_sent_is_the_same_whatever_the_sides_but_for_the_pictures(
    visitor, studio, lone, votes, monkeypatch
):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_STEPS", 0.0)  # every step is told
    streams = []
    for order in (0, 1):
        monkeypatch.setattr(blind_tab, "secrets", fixed(5, order))
        monkeypatch.setattr(studio, "_frames", Frames())  # both are drawn
        streams.append(visitor().draw())
    assert all(says_nothing(text, studio) for text in streams)
    files = [sent_pictures(text) for text in streams]
    assert [[url.rsplit("/", 1)[1] for url in urls] for urls in files] == [["left.png", "right.png"]] * 2
    drawn = [[pixels(url) for url in urls] for urls in files]
    assert drawn[0] == drawn[1][::-1] and sorted(drawn[0]) == sorted(lone(m, "a icon", 5) for m in METHODS)
    answers = [httpx.get(url) for urls in files for url in urls]
    for answer in answers:
        assert set(chunks(answer.content)) == {"IHDR", "IDAT", "IEND"}
        assert says_nothing(str(answer.headers), studio)
    # Each file is named by a hash of its content: the one on the left is the other one's on the right.
    left, right = (re.search(r"/(\w{64})/", url)[1] for url in files[0])
    swapped = streams[1].replace(left, "LEFT").replace(right, left).replace("LEFT", right)
    assert steady(swapped) == steady(streams[0]) and len(steady(swapped)) >= 6
    assert not votes.votes()


def steady(stream):
    """The messages of a stream without times and ids, and without those that only tell the queue."""
    kept = []
    for line in filter(None, stream.splitlines()):
        message = json.loads(line.removeprefix("data: "))
        if message["msg"] in ("process_generating", "process_completed"):
            output = json.dumps(message["output"]["data"])
            kept.append((message["msg"], re.sub(r"about \d+ s", "", output)))
    return kept


def test_either_order_occurs_as_often():
    """Within six standard deviations of a fair coin: a fair one fails once in 5e8 runs."""
    count = 2000
    kept = sum(shuffled("LoRA", "Flat-LoRA") == ("LoRA", "Flat-LoRA") for _ in range(count))
    assert abs(kept - count / 2) <= 6 * (count / 4) ** 0.5
    assert set(shuffled("LoRA", "Flat-LoRA")) == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "order", "chosen"),
    [("left", 1, "LoRA"), ("left", 0, "Flat-LoRA"), ("right", 1, "Flat-LoRA"), (TIE, 0, TIE)],
)
def test_a_vote_is_kept_as_it_was_meant(visitor, studio, votes, monkeypatch, choice, order, chosen):
    monkeypatch.setattr(blind_tab, "secrets", fixed(7, order))
    visit = visitor()
    visit.draw("  a red icon ")
    told = visit.vote(choice).text
    (vote,) = votes.votes()
    sides = METHODS if order else METHODS[::-1]
    assert (vote.left, vote.right, vote.chosen, vote.prompt, vote.seed) == (*sides, chosen, "a red icon", 7)
    assert vote.hashes == {method: studio.adapters[method].sha256 for method in METHODS}
    assert vote.settings == {**dataclasses.asdict(DRAWING), "scale": 1.0, "base": "tiny"}
    for url, method in zip(sent_pictures(told), sides, strict=True):
        content = httpx.get(url).content
        assert read(content) == studio.stamp(method, "a red icon", 7, DRAWING)
        name = f"**{method}**{', your choice' if method == chosen else ''}"
        assert f"{name}  \\nrank 4, scale 1, hash {studio.adapters[method].sha256[:10]}" in told


@pytest.mark.slow
def test_a_pair_gets_one_vote_however_many_are_sent(visitor, votes):
    visit = visitor()
    visit.draw()
    answers = []
    crowd = [
        threading.Thread(target=lambda choice=choice: answers.append(visit.vote(choice)))
        for choice in ("left", "right", TIE) * 4
    ]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert sum("preferred" in answer.text or "saw no" in answer.text for answer in answers) == 1
    visit.vote("left")
    assert len(votes.votes()) == 1
    visit.draw()
    visit.vote("right")
    assert len(votes.votes()) == 2


def test_without_an_open_pair_there_is_nothing_to_vote_on(visitor, votes):
    assert "There is no pair to vote on" in visitor().vote("left").text
    other = visitor()
    other.draw()
    assert "There is no pair to vote on" in visitor().vote("left").text
    assert not votes.votes()


def test_a_pair_is_gone_when_the_next_is_begun(visitor, votes, monkeypatch):
    visit = visitor()
    visit.draw()

    def broken(self, jobs):
        raise gr.Error("The lamp is out.", print_exception=False)

    monkeypatch.setattr(Studio, "run", broken)
    assert "The lamp is out." in visit.draw()
    assert "There is no pair to vote on" in visit.vote("left").text
    assert not votes.votes()


@pytest.mark.slow
def test_the_files_of_a_pair_go_with_the_next_one(visitor, votes, monkeypatch):
    made = []
    new_folder = Site.new_folder
    monkeypatch.setattr(Site, "new_folder", lambda self: made.append(new_folder(self)) or made[-1])
    visit = visitor()
    visit.draw()
    assert [len(list(folder.iterdir())) for folder in made] == [1, 1]
    visit.vote("left")
    visit.draw()
    assert [folder.exists() for folder in made] == [False, False, True, True]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["", "LoRA", "Flat-LoRA"], "it must have 1 to 1000."),
        (["x" * 1001, "LoRA", "Flat-LoRA"], "it must have 1 to 1000."),
        (["a", "LoRA", "LoRA"], "Choose two methods that are not the same"),
        (["a", "/etc/passwd", "LoRA"], "not in the list of choices"),
    ],
)
def test_what_cannot_be_drawn_is_refused(visitor, asked, told):
    assert told in visitor().draw(*asked)


@pytest.mark.slow
def test_the_base_can_be_tested_too(visitor, votes, lone, monkeypatch):
    monkeypatch.setattr(blind_tab, "secrets", fixed(3, 1))
    visit = visitor()
    urls = sent_pictures(visit.draw("a icon", "base", "LoRA"))
    assert [pixels(url) for url in urls] == [lone("base", "a icon", 3), lone("LoRA", "a icon", 3)]
    told = visit.vote("right").text
    assert "LoRA won 100% of 1 decided vote" in told
    assert votes.votes()[0].hashes["base"] is None


@pytest.mark.slow
def test_programs_get_the_tally_of_the_file(address, studio, votes, votes_path):
    hashes = {method: studio.adapters[method].sha256 for method in METHODS}
    for chosen in ["LoRA"] * 2 + ["Flat-LoRA"] * 5 + [TIE]:
        votes.add(Vote("a icon", 1, *METHODS, chosen, hashes))
    client = Client(address, verbose=False)
    told = client.predict("Flat-LoRA", "LoRA", api_name="/tally")
    expected = votes.tally("Flat-LoRA", "LoRA", hashes)
    assert told == {
        "one": "Flat-LoRA",
        "other": "LoRA",
        "one_wins": 5,
        "other_wins": 2,
        "ties": 1,
        "share": 5 / 7,
        "interval": list(expected.interval),
        "p_value": expected.p_value,
    }
    assert client.predict(one="base", other="LoRA", api_name="/tally")["share"] is None
    for pair in (("LoRA", "LoRA"), ("LoRA", "/etc/passwd"), ("../lora", "LoRA")):
        with pytest.raises(AppError, match=r"two methods|not in the list of choices"):
            client.predict(*pair, api_name="/tally")
    with votes_path.open("a") as file:
        file.write("junk\n")
    with pytest.raises(AppError, match="The votes cannot be read") as error:
        client.predict(*METHODS, api_name="/tally")
    assert str(votes_path.parent) not in str(error.value)
    endpoints = client.view_api(return_format="dict")
    assert sorted(endpoints["named_endpoints"]) == [
        *("/compare", "/grid", "/methods", "/tally", "/training_run")
    ]
    assert not endpoints["unnamed_endpoints"]


def test_a_file_that_cannot_be_written_or_read_loses_no_vote(visitor, votes, votes_path, caplog):
    visit = visitor()
    visit.draw()
    votes_path.mkdir()
    refused = visit.vote("left").text
    votes_path.rmdir()
    assert "The vote could not be written" in refused and says_nothing_of(refused, votes_path)
    assert "preferred" not in refused and f"{votes_path}: cannot be written" in caplog.text
    votes_path.write_text("junk\n")
    kept = visit.vote("left").text
    assert "Your vote is kept. The tally cannot be read" in kept and "You preferred" in kept
    assert says_nothing_of(kept, votes_path) and votes_path.read_text().count('"chosen"') == 1


def says_nothing_of(text, path):
    return str(path.parent) not in text


@pytest.mark.parametrize(
    ("wins", "losses", "said"),
    [
        (
            1,
            0,
            "every such test would be at least as one-sided (sign test, p = 1): this could well be chance",
        ),
        (5, 2, "45% of such tests would be at least as one-sided (sign test, p = 0.45): this could well be"),
        (
            12,
            5,
            "14% of such tests would be at least as one-sided (sign test, p = 0.14): chance is not ruled",
        ),
        (
            10,
            2,
            "4% of such tests would be at least as one-sided (sign test, p = 0.039): chance alone is unl",
        ),
        (
            12,
            1,
            "fewer than 1% of such tests would be at least as one-sided (sign test, p = 0.0034): chance ",
        ),
        (
            60,
            10,
            "fewer than 1% of such tests would be at least as one-sided (sign test, p < 0.001): chance ",
        ),
    ],
)
def test_the_p_value_in_words(wins, losses, said):
    met = Tally("A", "B", wins, losses, 3)
    for tally in (met, Tally("A", "B", losses, wins, 0)):
        assert f"If neither were better, {said}" in chance(tally)
        assert ("could well be chance" in chance(tally)) == (met.p_value >= 0.2)
        assert ("can show only large differences" in chance(tally)) == (wins + losses < 30)


def test_the_bar_shows_share_and_interval():
    shown = tally_html(Tally("<b>", "B", 6, 2, 1))
    assert "<h3>&lt;b&gt; against B: 9 votes</h3>" in shown and "<b>" not in shown
    low, high = (100 * end for end in Tally("A", "B", 6, 2, 1).interval)
    assert 'class="won" style="width: 75.00%"' in shown
    assert f'style="left: {low:.2f}%; width: {high - low:.2f}%"' in shown
    said = f"&lt;b&gt; won 75% of 8 decided votes; 95% interval (Wilson): {low:.0f}% to {high:.0f}%."
    assert shown.count(said) == 2  # for the eye, and for a screen reader
    undecided = tally_html(Tally("A", "B", 0, 0, 2))
    assert "Nobody has preferred either yet" in undecided and "share" not in undecided.replace("no share", "")


def test_a_page_without_a_file_of_votes_has_no_blind_test(studio):
    labels = [part["props"].get("label") for part in build(Site(studio, PRESETS)).config["components"]]
    assert "Compare" in labels and "Blind test" not in labels


def test_a_label_that_means_no_difference_is_refused(base_path, written_adapters, tmp_path):
    named = Studio(load_pipeline(str(base_path)), "tiny", {TIE: written_adapters["LoRA"]})
    with pytest.raises(UserError, match="an adapter is called 'tie'"):
        build(Site(named, PRESETS, votes=VoteFile(tmp_path / "votes.jsonl")))


def test_votes_into_a_folder_that_is_not_there_are_refused_at_the_start(tmp_path):
    path = tmp_path / "missing" / "votes.jsonl"
    with pytest.raises(UserError) as error:
        main(["--votes", str(path)])
    assert str(error.value) == f"--votes {path}: there is no folder {path.parent}; make it"


# In a browser.


# What the page's own requests are answered, streams as well: the page ends those itself.
RECORD = """() => {
    const [ask, recorded] = [window.fetch, (window.recorded = [])];
    const record = async (parts) => {
        const [reader, decoder] = [parts.getReader(), new TextDecoder()];
        for (let part; !(part = await reader.read()).done; ) recorded.push(decoder.decode(part.value));
    };
    window.fetch = async (...given) => {
        const answer = await ask(...given);
        record(answer.clone().body).catch(() => {});
        return answer;
    };
}"""


IN_VIEW = """(selector) => {
    const box = document.querySelector(selector).getBoundingClientRect();
    return box.top >= 0 && box.bottom <= innerHeight;
}"""


def open_tab(open_page, address, *device, **dark):
    page = open_page(address, *device, **dark)
    page.get_by_role("tab", name="Blind test").click()
    return page


def draw(page, button="#blind-draw"):
    page.locator(button).click()
    page.locator("#blind-status", has_text="Which is better?").wait_for()
    page.locator("#blind-right-picture img").wait_for()


def shown(page):
    """The pixels of both sides, as the server sent them."""
    return [
        pixels(page.locator(f"#blind-{side}-picture img").get_attribute("src")) for side in ("left", "right")
    ]


@pytest.mark.parametrize(("device", "dark"), [("desktop", True), ("phone", False)])
def test_a_pair_is_drawn_voted_on_and_revealed(
    open_page,
    address,
    studio,
    lone,
    votes,
    device,
    dark,
):
    page = open_tab(open_page, address, device, dark=dark)
    answers = []
    page.on("response", lambda answer: answers.append(f"{answer.url} {answer.headers}"))
    page.evaluate(RECORD)
    page.locator("#blind-prompt textarea").fill("a green icon")
    assert all(page.locator(f"#blind-{choice}").is_disabled() for choice in ("left", TIE, "right"))
    draw(page)
    before = shown(page)
    seen = page.locator("#blind-results").evaluate("part => part.outerHTML + part.innerText")
    assert says_nothing(seen, studio) and "a green icon" in seen
    answers += page.evaluate("recorded")
    assert says_nothing("".join(answers), studio)
    for expected in ("queue/join", "queue/data", "left.png", "right.png", "process_completed"):
        assert any(expected in answer for answer in answers)
    left, right = (page.locator(f"#blind-{side}-picture img") for side in ("left", "right"))
    assert [left.get_attribute("alt"), right.get_attribute("alt")] == [
        '"a green icon", on the left',
        '"a green icon", on the right',
    ]
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    assert 140 <= left.bounding_box()["width"] == pytest.approx(right.bounding_box()["width"], abs=1)
    assert not page.locator("#blind-tally section").count()
    page.wait_for_timeout(500)
    assert page.evaluate(IN_VIEW, "#blind-left-picture img") and page.evaluate(IN_VIEW, "#blind-right")

    page.locator("#blind-right").dblclick(force=True)
    page.locator("#blind-tally section").wait_for()
    (vote,) = votes.votes()
    assert vote.chosen == vote.right and vote.prompt == "a green icon"
    assert (
        page.locator("#blind-status").inner_text()
        == f"You preferred {vote.right}: left was {vote.left}, right was {vote.right}."
    )
    assert (
        shown(page) == before == [lone(method, vote.prompt, vote.seed) for method in (vote.left, vote.right)]
    )
    results = page.locator("#blind-results").inner_text()
    for method in METHODS:
        assert f"{method}{', your choice' if method == vote.right else ''}" in results.splitlines()
        assert f"rank 4, scale 1, hash {studio.adapters[method].sha256[:10]}" in results
    assert f"seed {vote.seed}, 2 steps of Euler, guidance 3, 16 x 16" in results
    wins = {vote.chosen: 1}
    assert (
        f"{METHODS[1]} better: {wins.get(METHODS[1], 0)}. {METHODS[0]} better: {wins.get(METHODS[0], 0)}."
        in results
    )
    assert all(page.locator(f"#blind-{choice}").is_disabled() for choice in ("left", TIE, "right"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_pairs_are_drawn_and_voted_on_with_the_keyboard(open_page, address, votes):
    page = open_tab(open_page, address)
    page.keyboard.press("ArrowLeft")  # the tabs' own key: nothing is open to vote on
    page.get_by_role("tab", name="Blind test").click()
    page.locator("#blind-another").focus()
    for number, (key, side) in enumerate((("ArrowLeft", "left"), ("ArrowRight", "right")), start=1):
        page.keyboard.press("Enter")
        page.locator("#blind-status", has_text="Which is better?").wait_for()
        assert page.locator("#blind-tally").inner_text() == ""
        assert "secondary" in page.locator("#blind-another").get_attribute("class")
        prompt = page.locator("#blind-prompt textarea")
        assert prompt.input_value() in [text for prompts in PRESETS.values() for text in prompts]
        prompt.focus()
        page.keyboard.press(key)  # moves the cursor
        page.keyboard.press("Shift+Tab")
        page.locator("#blind-another").focus()
        page.keyboard.press(f"Alt+{key}" if number == 2 else f"Shift+{key}")
        assert len(votes.votes()) == number - 1
        page.keyboard.press(key)
        page.locator("#blind-status", has_text="You preferred").wait_for()
        page.locator("#blind-another.primary").wait_for()  # it leads on
        vote = votes.votes()[number - 1]
        assert vote.chosen == getattr(vote, side) and vote.prompt == prompt.input_value()
    assert votes.votes()[0].seed != votes.votes()[1].seed
    draw(page)
    page.locator("#blind-left").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#blind-status", has_text="You saw no difference").wait_for()
    assert [vote.chosen == TIE for vote in votes.votes()] == [False, False, True]


def test_a_stopped_pair_cannot_be_voted_on(open_page, address, votes, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    original = Studio.run

    def slow(self, jobs):
        for event in original(self, jobs):
            yield event
            started.set()
            go_on.wait(20)

    page = open_tab(open_page, address)
    draw(page)
    with monkeypatch.context() as patch:
        patch.setattr(Studio, "run", slow)
        page.locator("#blind-draw").click()
        assert started.wait(20)
        page.locator("#blind-stop").click()
        page.locator("#blind-status", has_text="Stopped.").wait_for()
        go_on.set()
        page.wait_for_timeout(500)
    assert page.locator("#blind-left").is_disabled()
    assert not page.locator("#blind-left-picture img").count()
    draw(page)
    assert len(shown(page)) == 2 and not votes.votes()
