#!/usr/bin/env python
"""Base, LoRA and Flat-LoRA side by side in a browser, for the same prompt and seed. Try --help."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from flatlora_diffusion.cli import OneLineParser, run_command
from flatlora_diffusion.errors import UserError
from flatlora_diffusion.generate import (
    DTYPES,
    Drawing,
    default_device,
    draw_with,
    load_adapter,
    load_pipeline,
    parse_adapter,
)

PROJECT = Path(__file__).parent
ADAPTERS = {"LoRA": "lora", "Flat-LoRA": "flat_lora"}
MAX_PROMPT = 400
SHOWN_SIDE = 256  # smaller pictures are enlarged without smoothing


class Studio:
    """A pipeline with adapters, used by one request at a time.

    Args:
        base: Folder or hub name of the SDXL pipeline.
        adapters: Label -> adapter file or folder.
        resolution: Height and width of the pictures.
        device: Such as cuda or cpu.
        dtype: Name of a precision.
    """

    def __init__(
        self, base: str, adapters: dict[str, Path], resolution: int, device: str, dtype: str
    ) -> None:
        self.labels = ["base", *adapters]
        self._resolution = resolution
        self._pipeline = load_pipeline(base, device=device, dtype=DTYPES[dtype])
        for index, path in enumerate(adapters.values(), start=1):
            load_adapter(self._pipeline, f"adapter_{index}", path)
        # Switching adapters changes the pipeline, which all requests share.
        self._lock = threading.Lock()

    def compare(self, prompt: str, seed: int, steps: int, guidance: float) -> list[Image.Image]:
        """One picture for each label, from the same initial noise."""
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise gr.Error(f"The prompt must have 1 to {MAX_PROMPT} characters.")
        drawing = Drawing(self._resolution, self._resolution, int(steps), float(guidance))
        with self._lock:
            pictures = [
                draw_with(self._pipeline, f"adapter_{index}" if index else None, prompt, int(seed), drawing)
                for index in range(len(self.labels))
            ]
        return [enlarge(picture) for picture in pictures]


def enlarge(picture: Image.Image) -> Image.Image:
    """Small pictures at a size that can be looked at, pixel by pixel."""
    factor = max(1, SHOWN_SIDE // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def build(studio: Studio, prompt: str, steps: int, guidance: float) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Flat-LoRA") as page:
        gr.Markdown("## Flat-LoRA\nThe same prompt, seed and initial noise with each method.")
        with gr.Row():
            prompt_box = gr.Textbox(prompt, label="Prompt", max_length=MAX_PROMPT, scale=3)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            steps_slider = gr.Slider(1, 100, steps, step=1, label="Denoising steps")
            guidance_slider = gr.Slider(1, 15, guidance, step=0.5, label="Guidance")
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            pictures = [
                gr.Image(label=label, format="png", interactive=False, buttons=["download"])
                for label in studio.labels
            ]
        inputs = [prompt_box, seed, steps_slider, guidance_slider]
        gr.on([button.click, prompt_box.submit], studio.compare, inputs, pictures, api_name="compare")
    return page


def demo_adapters(project: Path) -> dict[str, Path]:
    """The adapters that `make demo` has trained, else those that come with the project."""
    for folder in (project / "demo-output", project / "assets" / "adapters"):
        adapters = {label: folder / name for label, name in ADAPTERS.items()}
        if all((path / "pytorch_lora_weights.safetensors").is_file() for path in adapters.values()):
            return adapters
    raise UserError(f"no adapters in {folder}: restore that folder, or give --adapter NAME=PATH")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the app."""
    parser = OneLineParser(prog="app.py", description=__doc__)
    parser.add_argument("--base", default=str(PROJECT / "assets" / "micro-sdxl"), help="SDXL pipeline.")
    parser.add_argument(
        "--adapter",
        type=parse_adapter,
        action="append",
        metavar="NAME=PATH",
        help="An adapter to show; may be given several times. Default: those of `make demo`, else of assets.",
    )
    parser.add_argument("--resolution", type=int, default=64, help="Height and width (default: 64).")
    parser.add_argument("--prompt", default="a fluent 3d icon of red apple", help="First prompt.")
    parser.add_argument("--steps", type=int, default=30, help="First number of steps (default: 30).")
    parser.add_argument("--guidance", type=float, default=4.0, help="First guidance (default: 4).")
    parser.add_argument("--device", default=default_device(), help="Such as cuda or cpu.")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="Precision (default: fp32).")
    parser.add_argument("--port", type=int, help="Default: the first free one from 7860.")
    given = parser.parse_all(arguments)
    adapters = dict(given.adapter or ()) or demo_adapters(PROJECT)
    studio = Studio(given.base, adapters, given.resolution, given.device, given.dtype)
    page = build(studio, given.prompt, given.steps, given.guidance)
    page.queue(max_size=8, default_concurrency_limit=1, api_open=False)
    page.launch(server_name="127.0.0.1", server_port=given.port, share=False, show_error=False)


if __name__ == "__main__":
    run_command(main)
