"""The tab that draws a pair on shuffled sides, asks which is better, and only then tells which is which."""

from __future__ import annotations

import dataclasses
import html
import logging
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.files import KEPT_SECONDS, forget
from flatlora_diffusion.app.limits import DRAWS, MAX_SEED, PRIVATE
from flatlora_diffusion.app.site import Site, check_prompt, warn_of_cut
from flatlora_diffusion.app.tally import tally_html
from flatlora_diffusion.app.votes import TIE, Tally, Vote, VoteFile
from flatlora_diffusion.app.widgets import connect_stop, preset_prompts, progress, scrolled_to, stop_button
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.samplers import SAMPLERS

logger = logging.getLogger(__name__)

_SIDES = ("left", "right")
_SCALE = 1.0  # of the adapters
_NOT_DRAWN = "The picture on the {}: not drawn yet"

_Update = dict[gr.components.Component, Any]


@dataclass(frozen=True)
class _Shown:
    """One side of a pair."""

    method: str
    picture: Image.Image
    folder: Path


@dataclass(frozen=True)
class _Pair:
    """A pair and its key, which stay on the server.

    Attributes:
        prompt: What both pictures show.
        seed: Of the initial noise that both begin with.
        drawing: How both are drawn.
        sides: Left and right.
        vote: Held by the one vote that the pair gets: clicks and forged requests may come at once.
    """

    prompt: str
    seed: int
    drawing: Drawing
    sides: tuple[_Shown, _Shown]
    vote: threading.Lock = field(default_factory=threading.Lock)


class BlindTab:
    """Builds the tab in the current context.

    The seed of a pair is always random, so that nobody can pick the pairs. The tally is shown after a vote
    and goes with the next pair: what others prefer, or what is still missing for a result, must not be in
    sight of who votes.

    Args:
        site: Draws.
        votes: Keeps the votes.
        page: Around it: arrow keys vote.

    Raises:
        UserError: An adapter has the label that votes use for no difference.
    """

    def __init__(self, site: Site, votes: VoteFile, page: gr.Blocks) -> None:
        self._site = site
        self._votes = votes
        self._methods = site.studio.methods
        if TIE in self._methods:
            raise UserError(f"an adapter is called {TIE!r}, as votes for neither are; give it another name")
        adapters = site.studio.adapters
        self._hashes = {
            method: adapters[method].sha256 if method in adapters else None for method in self._methods
        }
        gr.HTML(
            "<p>Which is better, when you don't know whose it is? Two methods draw the same prompt from the "
            "same seed. The sides are shuffled; which is which is told after your vote.</p>",
            elem_classes="lead",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self._build_settings()
            with gr.Column(scale=7, min_width=320, elem_id="blind-results"):
                self._build_results()
        self._connect(page)

    def _build_settings(self) -> None:
        presets, methods = self._site.presets, list(self._methods)
        first = next(iter(presets.values()), [""])[0]
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="blind-prompt")
        with gr.Row():
            self.draw_button = gr.Button(
                "Draw a pair", variant="primary", elem_id="blind-draw", min_width=120
            )
            self.stop_button = stop_button("blind-stop")
        if presets:
            with gr.Accordion("Prompts to choose from", open=False):
                preset_prompts(presets, self.prompt, "blind-draw")
        with gr.Row():
            self.one = gr.Dropdown(methods, value=methods[-2], label="One method", min_width=120)
            self.other = gr.Dropdown(methods, value=methods[-1], label="The other", min_width=120)

    def _build_results(self) -> None:
        self.status = gr.HTML(progress("Press Draw a pair."), elem_id="blind-status")
        self.pictures: dict[str, gr.Image] = {}
        self.captions: dict[str, gr.Markdown] = {}
        with gr.Row():
            for side in _SIDES:
                with gr.Column(min_width=140):  # beside each other on a phone too: they are called by side
                    self.pictures[side] = gr.Image(
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id=f"blind-{side}-picture",
                        elem_classes=self._site.picture_class,
                        label=side.capitalize(),
                        alt_text=_NOT_DRAWN.format(side),
                    )
                    self.captions[side] = gr.Markdown("", elem_classes="caption")
        choices = {"left": "Left is better", TIE: "No difference", "right": "Right is better"}
        with gr.Row(equal_height=True, elem_classes="choices"):
            self.buttons = {
                choice: gr.Button(text, interactive=False, elem_id=f"blind-{choice}", min_width=80)
                for choice, text in choices.items()
            }
        gr.Markdown("The arrow keys ← and → vote, too.", elem_classes=["caption", "for-keys"])
        if self._site.presets:
            self.another_button = gr.Button("Another pair: random prompt", elem_id="blind-another")
        self.tally = gr.HTML("", elem_id="blind-tally")
        if taught := self._site.references.strip():
            gr.HTML(
                f"<p>Judge by these: whose picture is more of their kind?</p>{taught}",
                elem_classes="thumbnails",
            )
        self.pair = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=_forget)

    def _connect(self, page: gr.Blocks) -> None:
        inputs = [self.one, self.other, self.pair]
        shown = [*self.pictures.values(), *self.captions.values(), *self.buttons.values(), self.tally]
        if self._site.presets:
            shown.append(self.another_button)
        outputs = [self.status, self.pair, *shown]
        how: dict[str, Any] = {
            "show_progress": "minimal",
            "show_progress_on": self.status,
            "trigger_mode": "once",
            "js": scrolled_to("blind-results"),
            **DRAWS,
            **PRIVATE,
        }
        drawing = [
            gr.on(
                [self.draw_button.click, self.prompt.submit],
                self._draw,
                [self.prompt, *inputs],
                outputs,
                **how,
            )
        ]
        if self._site.presets:
            drawing.append(
                self.another_button.click(self._draw_another, inputs, [self.prompt, *outputs], **how)
            )
        for event in drawing:
            event.success(None, js=scrolled_to("blind-results"), **PRIVATE)
        connect_stop(self.stop_button, self.status, drawing)
        for choice, button in self.buttons.items():
            # Past the queue: a vote need not wait for others' pictures, and isn't refused because of them.
            button.click(
                partial(self._vote, choice),
                self.pair,
                [self.status, *shown],
                show_progress="hidden",
                queue=False,
                **PRIVATE,
            )
        page.load(None, js=_VOTE_BY_ARROWS, **PRIVATE)
        methods = [gr.Dropdown(list(self._methods), visible=False) for _ in _SIDES]
        gr.Button(visible=False).click(
            self._tell_tally,
            methods,
            gr.JSON(visible=False),
            queue=False,
            api_name="tally",
            api_description="The votes on two methods: counts, share of the first, 95% interval, p-value.",
        )

    # Handlers.

    def _draw_another(self, one: str, other: str, before: _Pair | None) -> Iterator[_Update]:
        prompt = secrets.choice([prompt for prompts in self._site.presets.values() for prompt in prompts])
        drawing = self._draw(prompt, one, other, before)
        yield {self.prompt: prompt, **next(drawing)}
        yield from drawing

    def _draw(self, prompt: str, one: str, other: str, before: _Pair | None) -> Iterator[_Update]:
        prompt = check_prompt(prompt)
        if one == other:
            raise gr.Error("Choose two methods that are not the same.", print_exception=False)
        warn_of_cut(self._site.studio, prompt)
        _forget(before)
        yield {
            self.status: progress("Starting.", 0.0),
            self.pair: None,
            self.tally: "",
            **{self.pictures[side]: gr.Image(None, alt_text=_NOT_DRAWN.format(side)) for side in _SIDES},
            **dict.fromkeys(self.captions.values(), ""),
            **dict.fromkeys(self.buttons.values(), gr.Button(interactive=False)),
        }
        if self._site.presets:
            yield {self.another_button: gr.Button(variant="secondary")}
        site = self._site
        native = site.studio.native_side
        drawing = site.drawing("", site.steps, site.guidance, SAMPLERS[0], native, native)
        seed = secrets.randbelow(MAX_SEED + 1)
        drawn: list[tuple[str, Image.Image]] = []
        # The methods are drawn in the order of their fields, so times tell nothing of the sides.
        for event in site.studio.run(
            [Job(method, [(prompt, seed)], drawing, _SCALE) for method in (one, other)]
        ):
            if isinstance(event, Drawn):
                drawn.append(((one, other)[event.job], event.pictures[0]))
            else:
                told = f"Drawing both: about {event.seconds_left:.0f} s left."
                yield {self.status: progress(told, event.fraction)}
        left, right = (_Shown(method, picture, site.new_folder()) for method, picture in shuffled(*drawn))
        pair = _Pair(prompt, seed, drawing, (left, right))
        update: _Update = {
            self.status: progress("Which is better?"),
            self.pair: pair,
            **dict.fromkeys(self.buttons.values(), gr.Button(interactive=True)),
        }
        for side, shown in zip(_SIDES, pair.sides, strict=True):
            file = shown.folder / f"{side}.png"
            shown.picture.save(file)
            update[self.pictures[side]] = gr.Image(str(file), alt_text=f'"{prompt}", on the {side}')
        yield update

    def _vote(self, choice: str, pair: _Pair | None) -> _Update:
        if pair is None:
            raise gr.Error("There is no pair to vote on: draw one.", print_exception=False)
        if not pair.vote.acquire(blocking=False):
            return {self.status: gr.skip()}  # a second click, or a forged one
        left, right = (shown.method for shown in pair.sides)
        chosen = {"left": left, "right": right, TIE: TIE}[choice]
        settings = {**dataclasses.asdict(pair.drawing), "scale": _SCALE, "base": self._site.studio.base}
        hashes = {method: self._hashes[method] for method in (left, right)}
        try:
            self._votes.add(Vote(pair.prompt, pair.seed, left, right, chosen, hashes, settings))
        except UserError as error:
            pair.vote.release()
            logger.error("a vote of the blind test: %s", error)
            told = "The vote could not be written; where the app runs it says why. The pair stays open."
            return {self.status: progress(told)}
        told = f"You preferred {chosen}: left was {left}, right was {right}."
        if chosen == TIE:
            told = f"You saw no difference: left was {left}, right was {right}."
        update: _Update = {
            self.status: progress(told),
            self.tally: self._show_tally(pair),
            **dict.fromkeys(self.buttons.values(), gr.Button(interactive=False)),
        }
        for side, shown in zip(_SIDES, pair.sides, strict=True):
            made = (shown.method, pair.prompt, pair.seed, pair.drawing, _SCALE)
            file, _ = self._site.picture_files(shown.folder, shown.picture, *made)
            update[self.pictures[side]] = gr.Image(
                str(file), alt_text=f'"{pair.prompt}" drawn by {shown.method} with seed {pair.seed}'
            )
            name = f"**{html.escape(shown.method)}**{', your choice' if shown.method == chosen else ''}"
            update[self.captions[side]] = f"{name}  \n{self._site.caption(*made)}"
        if self._site.presets:  # it leads on
            update[self.another_button] = gr.Button(variant="primary")
        return update

    def _show_tally(self, pair: _Pair) -> str:
        # The method of the right-hand field is mostly the one that is tried: its share is told.
        one, other = sorted((shown.method for shown in pair.sides), key=self._methods.index, reverse=True)
        try:
            return tally_html(self._tally(one, other))
        except UserError as error:
            logger.error("the tally of the blind test: %s", error)
            return progress("Your vote is kept. The tally cannot be read; where the app runs it says why.")

    def _tell_tally(self, one: str, other: str) -> dict[str, Any]:
        if one == other:
            raise gr.Error("one and other must be two methods.", print_exception=False)
        try:
            tally = self._tally(one, other)
        except UserError as error:
            logger.error("the tally of the blind test: %s", error)
            told = "The votes cannot be read; where the app runs it says why."
            raise gr.Error(told, print_exception=False) from None
        return {
            **dataclasses.asdict(tally),
            "share": tally.share,
            "interval": tally.interval,
            "p_value": tally.p_value,
        }

    def _tally(self, one: str, other: str) -> Tally:
        return self._votes.tally(one, other, self._hashes)


def shuffled(one: Any, other: Any) -> tuple[Any, Any]:
    """The two in either order, as a coin falls that nobody can predict."""
    return (one, other) if secrets.randbits(1) else (other, one)


def _forget(pair: _Pair | None) -> None:
    """Delete the files of a pair."""
    if pair:
        forget(shown.folder for shown in pair.sides)


# Not where the arrows have a meaning of their own, nor with keys that make them one.
_VOTE_BY_ARROWS = """() => document.addEventListener("keydown", (event) => {
    const id = {ArrowLeft: "blind-left", ArrowRight: "blind-right"}[event.key];
    const button = id && document.getElementById(id);
    if (!button || button.disabled || !button.offsetParent || document.fullscreenElement) return;
    if (event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable], [role=tab], [role=slider]")) return;
    event.preventDefault();
    button.click();
})"""
