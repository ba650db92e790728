"""The tab of training runs: curves, validation pictures, settings and facts, with the runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from flatlora_diffusion.app.colours import FOLD_COLOUR, METHOD_COLOURS, OTHER_COLOURS
from flatlora_diffusion.app.limits import PRIVATE
from flatlora_diffusion.app.runs_table import TABLE_CSS, facts_table, settings_table
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.output.history import Curve
from flatlora_diffusion.output.reading import SMOOTHING, Reading, RunFolder

_NEWEST = 2  # so many steps are shown where none are chosen
_LARGEST_SIDE = 2048  # larger pictures are reduced for the page


def runs_tab(runs: Mapping[str, RunFolder]) -> None:
    """Build the content of the tab in the current `gr.Blocks`; its one public endpoint is `/training_run`.

    Args:
        runs: Label -> run, fixed for the life of the page; what they hold is read at every refresh.
    """

    def training_run(label: str) -> dict[str, Any]:
        """Curves (pairs of step and value), settings and facts of a training run, and what is missing."""
        if not isinstance(label, str) or label not in runs:
            known = ", ".join(runs) or "none"
            raise gr.Error(f"There is no such training run; there are: {known}.", print_exception=False)
        return run_record(runs[label])

    gr.api(training_run, api_name="training_run", queue=False)
    if not runs:
        gr.Markdown("No training run was given: start the app with `--run` and the output folder of one.")
        return
    gr.HTML(
        "<p>How the trainings went. The loss is the model's error: lower is better. On held-out pictures, "
        "which are not trained on, it tells what was learnt and not merely memorised.</p>",
        elem_classes="lead",
    )
    colours = run_colours(runs) | fold_colours(runs)  # a plot doesn't take others later
    chosen = gr.CheckboxGroup(list(runs), value=list(runs), label="Training runs")
    with gr.Row(equal_height=False):
        smooth = gr.Checkbox(
            True,
            label="Smooth the training loss",
            info=f"Exponential mean over about {round(1 / (1 - SMOOTHING))} steps.",
            scale=3,
            min_width=300,
        )
        refresh = gr.Button("Refresh", scale=1, min_width=160)
    verdict = gr.HTML(elem_id="runs-verdict")
    gaps = gr.Markdown(visible=False)
    loss, loss_text = _plot("loss", "Training loss", colours)
    with gr.Row():
        with gr.Column(min_width=300):
            sigma, sigma_text = _plot("sigma", "Noise strength sigma", colours)
        with gr.Column(min_width=300):
            heldout, heldout_text = _plot("held-out loss", "Held-out loss", colours)
    steps = gr.Dropdown(
        [],
        multiselect=True,
        label="Steps of the validation pictures",
        info=f"Without a choice the newest {_NEWEST} are shown.",
        visible=False,
    )
    gallery = gr.Gallery(
        label="Validation pictures",
        columns=3,
        height="max-content",
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        visible=False,
        elem_classes="runs-gallery",
    )
    gallery_text = gr.Markdown()
    facts = gr.HTML(css_template=TABLE_CSS, padding=False)
    settings = gr.HTML(css_template=TABLE_CSS, padding=False)

    def show(labels: list[str], smoothed: bool, wanted: list[int]) -> list[Any]:
        shown = {label: run.read() for label, run in runs.items() if label in labels}
        curves = {label: run.smoothed if smoothed else run.losses for label, run in shown.items()}
        sheets = validation_sheets(shown)
        drawn = sorted({step for _, step, _ in sheets if step is not None})
        wanted = [step for step in wanted if step in drawn]
        pictures, unreadable = open_sheets(sheets, set(wanted or drawn[-_NEWEST:]))
        heading = f"Training loss, {'smoothed' if smoothed else 'as it was'}"
        sigmas = {label: run.sigmas for label, run in shown.items()}
        heldout_losses = heldout_curves(shown, colours)
        return [
            verdicts({label: heldout_losses[label] for label in shown}) + averages(shown) + strengths(shown),
            _gaps_text(shown, unreadable),
            *_curves("loss", curves, "losses", colours, label=heading),
            *_curves("sigma", sigmas, "sigma", colours),
            *_curves("held-out loss", heldout_losses, "held-out loss", colours),
            gr.Dropdown(drawn, value=wanted, visible=len(drawn) > _NEWEST),
            gr.Gallery(pictures, visible=bool(pictures)),
            "" if pictures else "There are no validation pictures." if shown else "",
            facts_table({label: run.facts for label, run in shown.items()}),
            settings_table({label: run.settings for label, run in shown.items()}),
        ]

    outputs = [
        *(verdict, gaps, loss, loss_text, sigma, sigma_text, heldout, heldout_text),
        *(steps, gallery, gallery_text, facts, settings),
    ]
    inputs = [chosen, smooth, steps]
    events = [chosen.input, smooth.input, steps.input, refresh.click]
    # Past the queue, as all that doesn't draw: a page must open also while others wait for pictures.
    gr.on(events, show, inputs, outputs, show_progress="minimal", queue=False, **PRIVATE)
    gr.on(None, lambda: show(list(runs), True, []), None, outputs, queue=False, **PRIVATE)  # at every load


def verdicts(curves: Mapping[str, Curve]) -> str:
    """For each run, which of its measured steps was best for held-out images, and whether it got worse."""
    return "".join(f"<p>{_verdict(label, curve)}</p>" for label, curve in curves.items() if len(curve) > 1)


def _verdict(label: str, curve: Curve) -> str:
    (first, before), (last, after) = curve[0], curve[-1]
    best, least = min(curve, key=lambda point: point[1])
    name = f"<strong>{escape(label)}</strong>"
    if best == last:
        return (
            f"{name}: the held-out loss was lowest at the end ({least:.4g} at step {last}); it hasn't risen."
        )
    if best == first:
        return (
            f"{name}: the held-out loss was never lower than at its first measure ({before:.4g} at step "
            f"{first}); at the end it is {after:.4g}."
        )
    return (
        f"{name}: step {best} was best for held-out images ({least:.4g}). After it their loss rose to "
        f"{after:.4g} at step {last}, by {100 * (after / least - 1):.1f}%."
    )


def heldout_curves(runs: Mapping[str, Reading], colours: Mapping[str, str]) -> dict[str, Curve]:
    """The held-out loss of each run: of one with folds their mean, and beside it each that has a colour."""
    shown: dict[str, Curve] = {}
    for label, run in runs.items():
        mean, *folds = run.folds.values() or [run.heldout]
        named = {f"{label}, fold {number}": curve for number, curve in enumerate(folds, start=1)}
        shown |= {label: mean, **{name: curve for name, curve in named.items() if name in colours}}
    return shown


def fold_colours(runs: Mapping[str, RunFolder]) -> dict[str, str]:
    """The colour of each fold of the runs, by the name that `heldout_curves` gives it."""
    counts = {label: len(run.read().folds) - 1 for label, run in runs.items()}  # without the mean
    return {
        f"{label}, fold {number}": FOLD_COLOUR
        for label, count in counts.items()
        for number in range(1, count + 1)
    }


def averages(runs: Mapping[str, Reading]) -> str:
    """For each run whose folds have compared the adapter with its average, which was better."""
    found = {label: run.average for label, run in runs.items() if run.average}
    return "".join(
        f"<p><strong>{escape(label)}</strong>: {escape(text)}</p>" for label, text in found.items()
    )


def strengths(runs: Mapping[str, Reading]) -> str:
    """For each adapter of which an evaluation has noted it, the recommended scale."""
    noted = {label: run.strength for label, run in runs.items() if run.strength}
    return "".join(f"<p>{escape(strength.sentence(label))}</p>" for label, strength in noted.items())


def run_record(run: RunFolder) -> dict[str, Any]:
    """All that is known of a run, as JSON; without paths."""
    found = run.read()
    return {
        "label": run.label,
        "losses": found.losses,
        "smoothed_losses": found.smoothed,
        "sigmas": found.sigmas,
        "heldout_losses": found.heldout,
        "folds": found.folds,
        "validation_steps": [step for step, _ in found.validation],
        "settings": found.settings,
        "facts": found.facts,
        "gaps": found.gaps,
    }


def run_colours(runs: Mapping[str, RunFolder]) -> dict[str, str]:
    """Label -> colour: that of its method where no other run has it, else one of its own."""
    colours = {label: METHOD_COLOURS[label] for label in runs if label in METHOD_COLOURS}
    others = 0
    for label, run in runs.items():
        if label in colours:
            continue
        colour = METHOD_COLOURS.get(run.read().facts.get("method", ""))
        if colour is None or colour in colours.values():
            colour = OTHER_COLOURS[others % len(OTHER_COLOURS)]
            others += 1
        colours[label] = colour
    return colours


def validation_sheets(runs: Mapping[str, Reading]) -> list[tuple[str, int | None, Path]]:
    """Whose it is, the step and the file of every sheet, in the order of steps.

    Those after training have None for a step, and come last. Sheets that runs share come once.
    """
    sheets: dict[Path, tuple[str, int | None]] = {}
    for label, found in runs.items():
        sheets |= {path: (label, step) for step, path in found.validation}
    comparisons = {found.run.comparison for found in runs.values()} - {None}
    for found in runs.values():
        whose, comparison = found.run.label, found.run.comparison
        if comparison is not None:
            which = f"{comparison.resolve().name}: " if len(comparisons) > 1 else ""
            whose = f"{which}side by side"
        sheets |= {path: (whose, step) for step, path in found.side_by_side}
        if found.final_comparison:
            sheets[found.final_comparison] = (whose, None)
    ordered = sorted(sheets.items(), key=lambda sheet: math.inf if sheet[1][1] is None else sheet[1][1])
    return [(whose, step, path) for path, (whose, step) in ordered]


def open_sheets(
    sheets: Sequence[tuple[str, int | None, Path]], steps: set[int]
) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The pictures of these steps, and those after training, with captions; a line for each damaged one.

    Only pixels leave: whatever text a file carries stays behind.
    """
    pictures, unreadable = [], []
    for whose, step, path in sheets:
        if step is not None and step not in steps:
            continue
        caption = f"{whose[0].upper()}{whose[1:]}, {'after training' if step is None else f'step {step}'}"
        try:
            picture = open_image(path).convert("RGB")
        except UserError:
            unreadable.append(f"{caption}: the picture cannot be read")
            continue
        picture.info.clear()
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        pictures.append((picture, caption))
    return pictures, unreadable


def _plot(value: str, title: str, colours: dict[str, str]) -> tuple[gr.LinePlot, gr.HTML]:
    plot = gr.LinePlot(
        x="step",
        y=value,
        color="run",
        color_map=colours,
        x_title="Optimizer step",
        y_title=title,
        color_title="Training run",
        label=title,
        visible=False,
        buttons=["fullscreen"],
    )
    return plot, gr.HTML()


def _curves(
    value: str, curves: dict[str, Curve], what: str, colours: dict[str, str], **changes: Any
) -> list[Any]:
    """The plot of these curves, and in words where they end and which run has none.

    The words repeat the colours: on a phone the legend in the plot has no room for many runs.
    """
    rows = [(step, height, label) for label, curve in curves.items() for step, height in curve]
    frame = pd.DataFrame(rows, columns=["step", value, "run"])
    last = [
        f'<span aria-hidden="true" style="color: {colours[label]}">\N{BLACK CIRCLE}</span> '
        f"{escape(label)} {curve[-1][1]:.4g} at step {curve[-1][0]}"
        for label, curve in curves.items()
        if curve
    ]
    none = [escape(label) for label, curve in curves.items() if not curve]
    sentences = [f"Last value: {'; '.join(last)}."] if last else []
    if none:
        sentences.append(f"No {what} of {' and '.join(none)}.")
    return [gr.LinePlot(frame, visible=bool(rows), **changes), f"<p>{' '.join(sentences)}</p>"]


def _gaps_text(runs: dict[str, Reading], unreadable: list[str]) -> Any:
    lines = [f"{label}: {gap}" for label, run in runs.items() for gap in run.gaps] + unreadable
    if not runs:
        lines = ["Choose at least one training run."]
    return gr.Markdown("\n".join(f"- {line}" for line in lines), visible=bool(lines))
