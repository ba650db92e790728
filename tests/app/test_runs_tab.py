"""The tab of training runs: through its API, and in a real browser."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.app.colours import FOLD_COLOUR, METHOD_COLOURS, OTHER_COLOURS
from flatlora_diffusion.app.page import launch_settings
from flatlora_diffusion.app.runs_tab import (
    averages,
    fold_colours,
    heldout_curves,
    open_sheets,
    run_colours,
    run_record,
    runs_tab,
    validation_sheets,
    verdicts,
)
from flatlora_diffusion.app.runs_table import facts_table, settings_table
from flatlora_diffusion.output.reading import find_runs
from tests.browser import served
from tests.trained import SIGMA, STEPS

pytest_plugins = ["tests.browser", "tests.trained"]


def tab(runs) -> gr.Blocks:
    with gr.Blocks() as blocks:
        runs_tab(runs)
    blocks.queue(api_open=False)
    return blocks


@pytest.fixture
def runs(comparison):
    return find_runs(comparison)


@pytest.mark.slow
def test_the_api_gives_a_run_by_its_label(runs, comparison):
    with served(tab(runs)) as url:
        client = Client(url, verbose=False)
        assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/training_run"]
        for label, run in runs.items():
            given = client.predict(label, api_name="/training_run")
            assert given == json.loads(json.dumps(run_record(run)))
            assert given["losses"][-1][0] == STEPS
            assert str(comparison.parent) not in json.dumps(given)
        for unknown in ("lora", "../lora", str(comparison / "lora"), ["LoRA"], None):
            with pytest.raises(
                Exception, match=r"There is no such training run; there are: LoRA, Flat-LoRA\."
            ):
                client.predict(unknown, api_name="/training_run")


def test_without_runs_it_says_what_to_do():
    with served(tab({})) as url:
        client = Client(url, verbose=False)
        with pytest.raises(Exception, match="there are: none"):
            client.predict("LoRA", api_name="/training_run")
        texts = [part["props"].get("value", "") for part in client.config["components"]]
        assert any("start the app with `--run`" in str(text) for text in texts)


def test_sheets_come_by_step_and_shared_ones_once(runs):
    assert [
        (whose, step)
        for whose, step, _ in validation_sheets({label: run.read() for label, run in runs.items()})
    ] == [
        *((whose, step) for step in (2, 4, 6) for whose in ("LoRA", "Flat-LoRA", "side by side")),
        ("side by side", None),
    ]


def test_only_pixels_of_the_chosen_sheets_leave(comparison, clean_copy):
    folder = clean_copy(comparison)
    (folder / "lora" / "validation" / "step-000004.png").write_bytes(b"no picture")
    text = PngInfo()
    text.add_text("base", "/home/somebody/base")
    Image.new("RGB", (3000, 1500)).save(folder / "flat_lora" / "validation" / "step-000004.png", pnginfo=text)
    runs = {label: run.read() for label, run in find_runs(folder).items()}
    shown, unreadable = open_sheets(validation_sheets(runs), {4})
    assert [caption for _, caption in shown] == [
        "Flat-LoRA, step 4",
        "Side by side, step 4",
        "Side by side, after training",
    ]
    assert all(picture.info == {} for picture, _ in shown)
    assert shown[0][0].size == (2048, 1024)
    assert unreadable == ["LoRA, step 4: the picture cannot be read"]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_stands_out_in_light_and_in_dark_mode():
    """WCAG asks for a contrast of 3 for graphics; the grounds are those of gradio's blocks."""
    for colour in (*METHOD_COLOURS.values(), *OTHER_COLOURS, FOLD_COLOUR):
        for ground in ("#ffffff", "#27272a"):
            lighter, darker = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 3, (colour, ground)


def test_colours_follow_the_method_and_differ(comparison, clean_copy):
    arms = find_runs(comparison)
    assert run_colours(arms) == METHOD_COLOURS
    alone = find_runs(clean_copy(comparison / "flat_lora", "mine"))
    assert run_colours(alone) == {"mine": METHOD_COLOURS["Flat-LoRA"]}
    both = run_colours(alone | arms)
    assert {label: both[label] for label in arms} == METHOD_COLOURS
    assert both["mine"] == OTHER_COLOURS[0]


def test_folds_stand_for_the_held_out_loss_of_their_run():
    mean, fold, other = [(1, 0.3), (2, 0.2)], [(1, 0.4)], [(2, 0.5)]
    runs = {
        "A": SimpleNamespace(heldout=[], folds={"mean of 1 folds": mean, "fold 1": fold}),
        "B": SimpleNamespace(heldout=other, folds={}),
    }
    colours = fold_colours({label: SimpleNamespace(read=lambda run=run: run) for label, run in runs.items()})
    assert colours == {"A, fold 1": FOLD_COLOUR}
    assert heldout_curves(runs, colours) == {"A": mean, "A, fold 1": fold, "B": other}
    assert heldout_curves(runs, {}) == {"A": mean, "B": other}


def test_what_folds_found_of_the_average_is_told_as_text():
    runs = {"<i>A</i>": SimpleNamespace(average="The average <b>"), "B": SimpleNamespace(average=None)}
    assert averages(runs) == "<p><strong>&lt;i&gt;A&lt;/i&gt;</strong>: The average &lt;b&gt;</p>"


def test_tables_mark_what_differs_in_words_and_hold_text_alone():
    table = facts_table(
        {
            "<i>A</i>": {"state": "finished", "steps": 6, "rank": 4, "method": "<b>x</b>"},
            "B": {"state": "unfinished", "steps": 3, "total_steps": 6, "rank": 4},
        }
    )
    assert "<i>" not in table
    assert "<b>" not in table
    assert "&lt;b&gt;x&lt;/b&gt;" in table
    order = [
        "Different between the runs",
        "finished, 6 steps",
        "3 of 6 steps",
        "The same in all runs",
        "Rank",
    ]
    places = [table.index(words) for words in order]
    assert places == sorted(places)
    # What one of the runs doesn't know is no difference.
    assert table.index("The same in all runs") < table.index("Method") < table.index("not known")


def test_settings_at_their_defaults_are_folded_up():
    table = settings_table({"A": {"rank": 8, "seed": 0}, "B": {"rank": 4, "seed": 0, "snr_gamma": None}})
    open_part, folded = table.split("<details>")
    assert "rank" in open_part
    assert "Settings at their defaults (2)" in folded
    assert "seed" in folded
    assert "snr_<wbr>gamma" in folded
    assert settings_table({}) == facts_table({}) == ""


@pytest.mark.parametrize(
    ("device", "dark"), [("desktop", False), ("phone", True)], ids=["desktop", "phone in the dark"]
)
def test_in_a_browser(device, dark, comparison, clean_copy, open_page):
    folder = clean_copy(comparison)
    with served(tab(find_runs(folder)), **launch_settings()) as url:
        page = open_page(url, device, dark)
        plots = {
            name: page.locator(".block", has=page.get_by_text(name, exact=True)).locator("svg.marks")
            for name in ("Training loss, smoothed", "Noise strength sigma", "Held-out loss")
        }

        def lines(name: str) -> list[str]:
            """The colours of the curves of a plot."""
            plots[name].locator(".role-legend").wait_for()
            marks = plots[name].locator(".mark-line path:not(.background):not(.foreground)").all()
            return sorted(mark.get_attribute("stroke") for mark in marks)

        for name in plots:
            assert lines(name) == sorted(METHOD_COLOURS.values())
        pictures = page.locator(".runs-gallery img")
        pictures.nth(6).wait_for()
        shown = [picture.get_attribute("alt") for picture in pictures.all()]
        newest = [
            f"{whose}, step {step}"
            for step, whose in itertools.product((4, 6), ("LoRA", "Flat-LoRA", "Side by side"))
        ]
        assert shown == [*newest, "Side by side, after training"]
        table = page.get_by_role("region", name="Adapter and run")
        assert table.get_by_role("columnheader", name="Flat-LoRA").is_visible()
        assert page.get_by_role("rowheader", name="flat_sigma").first.is_visible()
        assert (
            "a <b>icon</b> ${1+1} {{x}}"
            in page.get_by_role("region", name="Settings that were given").inner_text()
        )
        # The page itself never scrolls sideways.
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0
        assert page.viewport_size["width"] == {"desktop": 1280, "phone": 390}[device]

        # By keyboard: leave out a run; the plots, the pictures and the tables follow.
        page.get_by_label("LoRA", exact=True).focus()
        page.keyboard.press("Space")
        last = SIGMA * (1 - math.cos(math.pi * (STEPS - 1) / STEPS)) / 2
        page.get_by_text(
            f"Last value: \N{BLACK CIRCLE} Flat-LoRA {last:.4g} at step {STEPS}.", exact=True
        ).wait_for()
        assert lines("Noise strength sigma") == [METHOD_COLOURS["Flat-LoRA"]]
        assert table.get_by_role("columnheader").count() == 2
        assert "LoRA, step 4" not in [picture.get_attribute("alt") for picture in pictures.all()]

        # The steps of the pictures.
        page.get_by_label("Steps of the validation pictures").click()
        page.get_by_role("option", name="2").click()
        page.locator('.runs-gallery img[alt="Flat-LoRA, step 2"]').wait_for()
        assert pictures.count() == 3

        # A run in progress is read afresh.
        shutil.rmtree(folder / "flat_lora")
        page.get_by_role("button", name="Refresh").click()
        page.get_by_text("Flat-LoRA: the folder has gone").wait_for()
        page.get_by_text("No losses of Flat-LoRA.").wait_for()
        assert not table.is_visible()
        assert not plots["Noise strength sigma"].is_visible()


def test_a_sentence_says_which_step_was_best_and_whether_the_loss_rose():
    said = verdicts(
        {
            "<b>": [(0, 0.5), (10, 0.4), (20, 0.44)],
            "falls": [(0, 0.5), (10, 0.4)],
            "rises": [(0, 0.5), (10, 0.6)],
            "one": [(0, 0.5)],
        }
    )
    assert said.split("</p>")[:-1] == [
        "<p><strong>&lt;b&gt;</strong>: step 10 was best for held-out images (0.4). After it their loss rose "
        "to 0.44 at step 20, by 10.0%.",
        "<p><strong>falls</strong>: the held-out loss was lowest at the end (0.4 at step 10); it hasn't "
        "risen.",
        "<p><strong>rises</strong>: the held-out loss was never lower than at its first measure (0.5 at step "
        "0); at the end it is 0.6.",
    ]
