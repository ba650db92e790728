"""The tab that draws a prompt at many scales of the adapters, and moves through the pictures at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.engine import Drawn, Job
from flatlora_diffusion.app.files import KEPT_SECONDS, forget
from flatlora_diffusion.app.limits import DRAWS, MAX_SEED, PRIVATE
from flatlora_diffusion.app.site import Site, check_prompt, check_seed, warn_of_cut
from flatlora_diffusion.app.widgets import connect_stop, preset_prompts, progress, scrolled_to, stop_button
from flatlora_diffusion.common.pictures import png_bytes
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.sheet.animation import gif, there_and_back
from flatlora_diffusion.sheet.layout import contact_sheet

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

_MILLISECONDS = 400
_LARGEST = 512  # pixels a side, in what moves

_Update = dict[gr.components.Component, Any]


@dataclass(frozen=True)
class _Sweep:
    """Pictures at all scales.

    Attributes:
        prompt: What they show.
        seed: Of all of them.
        folder: That of the files.
        files: Label of an adapter -> its picture at each of `SCALES`.
    """

    prompt: str
    seed: int
    folder: Path
    files: Mapping[str, Mapping[float, Path]]

    def forget(self) -> None:
        """Delete the files."""
        forget([self.folder])


class StrengthTab:
    """Builds the tab in the current context.

    At scale 0 every adapter's picture is that of the base, which is drawn once. What was drawn lately isn't
    drawn again: see `engine.Studio`.

    Args:
        site: Draws; it has adapters.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._labels = list(site.studio.adapters)
        gr.HTML(
            "<p>How strong should an adapter be? Its change of the model can be multiplied by a scale: 0 is "
            "the base, 1 is as trained. All scales are drawn once; then the slider moves through them.</p>",
            elem_classes="lead",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320, elem_id="strength-results"):
                self._build_results()
            with gr.Column(scale=5, min_width=300):
                self._build_settings()
        self._connect()

    def _build_settings(self) -> None:
        first = next(iter(self._site.presets.values()), [""])[0]
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="strength-prompt")
        with gr.Row():
            self.button = gr.Button(
                "Draw all scales", variant="primary", elem_id="strength-draw", min_width=120
            )
            self.stop_button = stop_button("strength-stop")
        self.seed = gr.Number(
            0, label="Seed", step=1, minimum=0, maximum=MAX_SEED, elem_id="strength-seed", min_width=140
        )
        preset_prompts(self._site.presets, self.prompt, "strength-draw")

    def _build_results(self) -> None:
        self.pictures: dict[str, gr.Image] = {}
        with gr.Row(elem_classes="side-by-side"):
            for index, label in enumerate(self._labels):
                with gr.Column(min_width=90):
                    self.pictures[label] = gr.Image(
                        format="png",
                        label=label,
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id=f"strength-{index}",
                        elem_classes=self._site.picture_class,
                        alt_text=f"{label}: not drawn yet",
                    )
        self.scale = gr.Slider(
            SCALES[0],
            SCALES[-1],
            1.0,
            step=SCALES[1],
            label="Scale of the adapters",
            interactive=False,
            elem_id="strength-scale",
        )
        self.status = gr.HTML(progress("Press Draw all scales."), elem_id="strength-status")
        with gr.Row():
            how: dict[str, Any] = {"interactive": False, "min_width": 140}
            self.sheet = gr.DownloadButton("All scales (PNG)", elem_id="strength-sheet", **how)
            self.moving = gr.DownloadButton("Moving (GIF)", elem_id="strength-gif", **how)
        self.sweep = gr.State(
            None, time_to_live=KEPT_SECONDS, delete_callback=lambda sweep: sweep and sweep.forget()
        )

    def _connect(self) -> None:
        drawing = self.button.click(
            self._draw,
            [self.prompt, self.seed, self.scale, self.sweep],
            [self.status, self.scale, self.sheet, self.moving, self.sweep, *self.pictures.values()],
            show_progress="full",
            show_progress_on=self.status,
            js=scrolled_to("strength-results"),
            trigger_mode="once",
            **DRAWS,
            **PRIVATE,
        )
        connect_stop(self.stop_button, self.status, [drawing])
        self.scale.input(
            self._show,
            [self.sweep, self.scale],
            list(self.pictures.values()),
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            **PRIVATE,
        )

    # Handlers.

    def _draw(self, prompt: str, seed: float, scale: float, before: _Sweep | None) -> Iterator[_Update]:
        site = self._site
        prompt, seed = check_prompt(prompt), check_seed(seed)
        warn_of_cut(site.studio, prompt)
        side = site.studio.native_side
        drawing = site.drawing("", site.steps, site.guidance, SAMPLERS[0], side, side)
        if before:
            before.forget()
        unusable = gr.DownloadButton(value=None, interactive=False)
        yield {
            self.status: progress("Starting.", 0.0),
            self.scale: gr.Slider(interactive=False),
            self.sheet: unusable,
            self.moving: unusable,
            self.sweep: None,
            **{
                picture: gr.Image(None, alt_text=f"{label}: not drawn yet")
                for label, picture in self.pictures.items()
            },
        }
        # The scales that matter come first: whoever stops has seen something.
        asked = [(BASE, 0.0)] + [(label, own) for own in SCALES[1:] for label in self._labels]
        jobs = [Job(method, [(prompt, seed)], drawing, own) for method, own in asked]
        folder = site.new_folder()
        files: dict[str, dict[float, Path]] = {label: {} for label in self._labels}
        try:
            for event in site.studio.run(jobs):
                method, own = asked[event.job]
                if not isinstance(event, Drawn):
                    told = f"{method} at scale {own:g}: about {event.seconds_left:.0f} s left for all."
                    yield {self.status: progress(told, event.fraction)}
                    continue
                file, _ = site.picture_files(
                    self._place(folder, own), event.pictures[0], method, prompt, seed, drawing, own
                )
                labels = self._labels if method == BASE else [method]
                for label in labels:
                    files[label][own] = file
                yield {self.pictures[label]: self._picture(label, own, file, prompt) for label in labels}
            sweep = _Sweep(prompt, seed, folder, files)
            still, moving = _keepsakes(sweep)
        except BaseException:  # it was stopped, or failed
            forget([folder])
            raise
        yield {
            self.status: progress("Done: move the slider."),
            self.scale: gr.Slider(interactive=True),
            self.sheet: gr.DownloadButton(value=str(still), interactive=True),
            self.moving: gr.DownloadButton(value=str(moving), interactive=True),
            self.sweep: sweep,
            **dict(zip(self.pictures.values(), self._show(sweep, scale), strict=True)),
        }

    @staticmethod
    def _place(folder: Path, scale: float) -> Path:
        place = folder / f"scale-{scale:g}"
        place.mkdir(exist_ok=True)
        return place

    @staticmethod
    def _picture(label: str, scale: float, file: Path, prompt: str) -> gr.Image:
        alt = f'"{prompt}" drawn by {label} at scale {scale:g}'
        return gr.Image(str(file), label=f"{label} x {scale:g}", alt_text=alt)

    def _show(self, sweep: _Sweep | None, scale: float) -> list[Any]:
        """The pictures at the nearest of the scales."""
        if sweep is None or not isinstance(scale, (int, float)):
            return [gr.skip()] * len(self._labels)
        nearest = min(SCALES, key=lambda own: abs(own - scale))
        return [
            self._picture(label, nearest, sweep.files[label][nearest], sweep.prompt) for label in self._labels
        ]


def _keepsakes(sweep: _Sweep) -> tuple[Path, Path]:
    """All pictures on one sheet, and moving as a GIF."""
    pictures: dict[str, list[Image.Image]] = {}
    for label, own in sweep.files.items():
        pictures[label] = []
        for scale in SCALES:
            with Image.open(own[scale]) as picture:
                pictures[label].append(picture.copy())
    footer = f"seed {sweep.seed}; columns: scale of the adapter"
    sheet = contact_sheet(
        list(pictures.values()),
        columns=[f"x {scale:g}" for scale in SCALES],
        rows=list(pictures),
        title=sweep.prompt,
        footer=footer,
    )
    still, moving = (sweep.folder / f"scales-seed{sweep.seed}.{kind}" for kind in ("png", "gif"))
    still.write_bytes(png_bytes(sheet))
    for own in pictures.values():
        for picture in own:
            picture.thumbnail((_LARGEST, _LARGEST))
    columns = list(zip(*pictures.values(), strict=True))
    frames = [
        contact_sheet(
            [list(column)], columns=list(pictures), rows=[""], title=sweep.prompt, footer=f"x {scale:g}"
        )
        for scale, column in zip(SCALES, columns, strict=True)
    ]
    moving.write_bytes(gif(there_and_back(frames), _MILLISECONDS))
    return still, moving
