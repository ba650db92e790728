"""What the tabs share: the engine, the limits of what can be asked for, and how pictures are handed out."""

from __future__ import annotations

import contextlib
import html
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flatlora_diffusion.app.engine import Studio
from flatlora_diffusion.app.files import forget
from flatlora_diffusion.app.limits import MAX_GUIDANCE, MAX_PROMPT, MAX_SCALE, MAX_SEED, MAX_STEPS
from flatlora_diffusion.app.measured import Measured
from flatlora_diffusion.app.references import References
from flatlora_diffusion.app.votes import VoteFile
from flatlora_diffusion.draw import stamp
from flatlora_diffusion.draw.pipeline import Drawing
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.draw.stamp import sidecar
from flatlora_diffusion.grid.plan import unique_slugs
from flatlora_diffusion.output.names import ARMS
from flatlora_diffusion.output.reading import RunFolder

_SMALL = 256  # pictures of at most so many pixels a side are enlarged without smoothing


@dataclass(frozen=True)
class Site:
    """A page's engine and first values.

    Attributes:
        studio: Draws.
        presets: Heading -> prompts that can be chosen.
        steps: First number of denoising steps.
        guidance: First guidance.
        runs: Label -> training run.
        references: What the runs taught.
        measured: Of the adapters, before.
        toy: The base is the project's demo, and the page says so.
        votes: Those of the blind test; without, the page has none.
    """

    studio: Studio
    presets: Mapping[str, Sequence[str]]
    steps: int = 30
    guidance: float = 5.0
    runs: Mapping[str, RunFolder] = field(default_factory=dict)
    votes: VoteFile | None = None
    references: References = field(default_factory=References)
    measured: Measured = field(default_factory=Measured)
    toy: bool = False
    _folder: tempfile.TemporaryDirectory = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="flatlora-page-")
    )

    @property
    def smallest_side(self) -> int:
        """In pixels, as `largest_side`."""
        return max(8, self.studio.native_side // 2 // 8 * 8)

    @property
    def largest_side(self) -> int:
        """Half as much again as what the base was trained on."""
        return self.studio.native_side * 3 // 2 // 8 * 8

    @property
    def batch_size(self) -> int:
        """Pictures that are drawn together, where there are many: small ones fit into any memory."""
        return 8 if self.small else 1

    @property
    def draws_fast(self) -> bool:
        """Whether a comparison takes seconds: with a small base, or on a GPU."""
        return self.small or self.studio.device != "cpu"

    @property
    def small(self) -> bool:
        """Whether pictures are so small that they are enlarged."""
        return self.studio.native_side <= _SMALL

    @property
    def picture_class(self) -> list[str]:
        """CSS class of pictures."""
        return ["picture", "crisp"] if self.small else ["picture"]

    @property
    def introduction(self) -> str:
        """What the page compares, in a few sentences, as HTML."""
        names = [f"<strong>{html.escape(label)}</strong>" for label in self.studio.adapters]
        one, other = names[-2:] if len(names) > 1 else ("", "")
        methods = [adapter.method for adapter in self.studio.adapters.values()][-2:]
        shaken = "shakes the model's weights at random while it learns, so that later changes do less harm"
        start = (
            '<span class="for-large">Each draws the same prompt from the same random start, the seed.</span>'
        )
        base = "(the <strong>base</strong>)"
        if self.toy and methods == list(ARMS) and self.references.trained:
            side, count = self.studio.native_side, len(self.references.trained)
            return (
                f"A toy model that draws icons of {side} x {side} pixels {base} was taught the style of "
                f"{count} icons in two ways: with {one}, the usual one, and with {other}, which {shaken}. "
                f"{start}"
            )
        listed = f"{', '.join(names)} and the model that they change" if names else "A model"
        return f"{listed} {base}, side by side. {start} Flat-LoRA is a way to train that {shaken}."

    @property
    def verdict(self) -> str:
        """What was measured of the two methods that the page opens with, as HTML; empty without adapters."""
        if not self.studio.adapters:
            return ""
        told = self.measured.verdict(*self.studio.methods[-2:])
        if not told and len(self.studio.adapters) > 1:
            told = "Which one is better was not measured here."
        judge = 'Judge for yourself in the <a href="#blind">blind test</a>.'
        return f"{told} {judge}" if told and self.votes else told

    def drawing_fields(self) -> list[gr.Textbox | gr.Slider | gr.Dropdown]:
        """Fields in the current context for what `drawing` takes, in its order."""
        sides: dict[str, Any] = {"minimum": self.smallest_side, "maximum": self.largest_side, "step": 8}
        return [
            gr.Textbox("", label="Negative prompt", info="What the picture should not show."),
            gr.Slider(
                1,
                MAX_STEPS,
                self.steps,
                step=1,
                label="Denoising steps",
                info="A picture is made of noise in so many steps.",
            ),
            gr.Slider(
                0,
                MAX_GUIDANCE,
                self.guidance,
                step=0.1,
                label="Guidance",
                info="How closely the picture keeps to the prompt.",
            ),
            gr.Dropdown(
                list(SAMPLERS),
                value=SAMPLERS[0],
                label="Sampler",
                info="The rule for each of the steps.",
            ),
            gr.Slider(value=self.studio.native_side, label="Width", **sides),
            gr.Slider(value=self.studio.native_side, label="Height", **sides),
        ]

    def drawing(
        self, negative_prompt: str, steps: int, guidance: float, sampler: str, width: int, height: int
    ) -> Drawing:
        """The settings, checked.

        Raises:
            gradio.Error: One of them is out of its limits.
        """
        if len(negative_prompt) > MAX_PROMPT:
            raise refusal(
                f"The negative prompt has {len(negative_prompt)} characters; "
                f"it must have at most {MAX_PROMPT}."
            )
        _require("Steps", steps, 1, MAX_STEPS, 1)
        _require("Guidance", guidance, 0, MAX_GUIDANCE)
        for name, side in (("Width", width), ("Height", height)):
            _require(name, side, self.smallest_side, self.largest_side, 8)
        if sampler not in SAMPLERS:
            raise refusal(f"The sampler must be one of {', '.join(SAMPLERS)}.")
        return Drawing(
            int(width),
            int(height),
            int(steps),
            float(guidance),
            negative_prompt or None,
            sampler,
            caption_chunks=self.studio.caption_chunks,
            transparent=self.studio.transparent,
        )

    def picture_files(
        self,
        folder: Path,
        picture: Image.Image,
        method: str,
        prompt: str,
        seed: int,
        drawing: Drawing,
        scale: float,
        parts: Sequence[float] = (),
    ) -> tuple[Path, Path]:
        """Write a picture that says how it was made, and a JSON file that says the same.

        Args:
            folder: From `new_folder`.
            picture: As drawn.
            method: The base or an adapter's label.
            prompt: Its prompt.
            seed: Its seed.
            drawing: How it was drawn.
            scale: Of the adapter's update.
            parts: Of a mix: the scale of each of its adapters, in place of its own.
        """
        made = self.studio.stamp(method, prompt, seed, drawing, scale, parts)
        names = dict(zip(self.studio.methods, unique_slugs(self.studio.methods), strict=True))
        png = folder / f"{names[method]}-seed{seed}.png"
        png.write_bytes(stamp.png(picture, made))
        png.with_suffix(".json").write_bytes(sidecar(made))
        return png, png.with_suffix(".json")

    def caption(
        self,
        method: str,
        prompt: str,
        seed: int,
        drawing: Drawing,
        scale: float,
        parts: Sequence[float] = (),
    ) -> str:
        """How a picture was made, as two lines of Markdown; of the base one. See `picture_files`."""
        made = self.studio.stamp(method, prompt, seed, drawing, scale, parts)
        adapter = self.studio.adapters.get(method)
        of_adapter = ""
        if adapter:
            mixed = " + ".join(f"{part:g}" for _, part in made.mix or ())
            scales = f"{scale:g} x ({mixed})" if mixed else f"{scale:g}"
            of_adapter = f"rank {adapter.rank}, scale {scales}, hash {str(made.adapter_sha256)[:10]}  \n"
        return (
            f"{of_adapter}seed {seed}, {drawing.steps} steps of {made.sampler}, "
            f"guidance {drawing.guidance:g}, {drawing.width} x {drawing.height}"
        )

    @contextlib.contextmanager
    def lent_folder(self) -> Iterator[Path]:
        """An empty folder that goes after the block: what an event yields there has been copied by then."""
        folder = self.new_folder()
        try:
            yield folder
        finally:
            forget([folder])

    def new_folder(self) -> Path:
        """An empty folder for files that are handed out; it goes with the page."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))


def warn_of_cut(studio: Studio, *prompts: str | None) -> None:
    """Tell the page which prompts are longer than the text encoders read, and where they end."""
    for prompt in dict.fromkeys(filter(None, prompts)):
        if told := studio.where_cut(prompt):
            gr.Warning(html.escape(told))


def check_prompt(prompt: str) -> str:
    """A prompt without white space around it.

    Raises:
        gradio.Error: It is empty or too long.
    """
    prompt = prompt.strip()
    if not prompt or len(prompt) > MAX_PROMPT:
        raise refusal(f"The prompt has {len(prompt)} characters; it must have 1 to {MAX_PROMPT}.")
    return prompt


def check_seed(seed: float) -> int:
    """A seed as a whole number.

    Raises:
        gradio.Error: It is none.
    """
    _require("The seed", seed, 0, MAX_SEED, 1)
    return int(seed)


def check_scale(scale: float) -> float:
    """The scale of an adapter's update.

    Raises:
        gradio.Error: It is out of its limits.
    """
    _require("The scale of the adapters", scale, 0, MAX_SCALE)
    return float(scale)


def check_part(scale: float) -> float:
    """The scale of an adapter in a mix; below 0 it is taken away.

    Raises:
        gradio.Error: It is out of its limits.
    """
    _require("The scale of an adapter in a mix", scale, -MAX_SCALE, MAX_SCALE)
    return float(scale)


def check_sigma(sigma: float, most: float) -> float:
    """The strength of noise on weights.

    Raises:
        gradio.Error: It is out of its limits.
    """
    _require("Sigma", sigma, 0, most)
    return float(sigma)


def check_draw(draw: float) -> int:
    """The number of a draw of noise.

    Raises:
        gradio.Error: It is none.
    """
    _require("The number of the noise", draw, 0, MAX_SEED, 1)
    return int(draw)


def _require(name: str, value: Any, least: float, most: float, step: int | None = None) -> None:
    number = isinstance(value, (int, float)) and math.isfinite(value)
    if not number or not least <= value <= most or (step and value % step):
        kind = {None: "a number", 1: "a whole number"}.get(step, f"a multiple of {step}")
        raise refusal(f"{name} must be {kind} from {_plain(least)} to {_plain(most)}.")


def _plain(number: float) -> str:
    """A number as people write it: large ones with all their digits."""
    return f"{number:g}" if number % 1 else f"{number:.0f}"


def refusal(told: str) -> gr.Error:
    """What a visitor is told who asks for too much; the server's log has no traceback of it."""
    return gr.Error(told, print_exception=False)
