"""The page as a whole, and how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from flatlora_diffusion.app.blind_tab import BlindTab
from flatlora_diffusion.app.checked import CheckedBlocks
from flatlora_diffusion.app.compare_tab import CompareTab
from flatlora_diffusion.app.grid_tab import GridTab
from flatlora_diffusion.app.guard import Guard, KnownHosts
from flatlora_diffusion.app.runs_tab import runs_tab
from flatlora_diffusion.app.site import Site

_WAITING = 8  # requests; others are told to come back
_DAY = 86_400


def build(site: Site) -> gr.Blocks:
    """The page, with its queue."""
    # Files that were handed out go after a day.
    with CheckedBlocks(title="Flat-LoRA", analytics_enabled=False, delete_cache=(_DAY, _DAY)) as page:
        gr.Markdown("# Flat-LoRA\nThe same prompt, seed and initial noise with each method.")
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                CompareTab(site, page)
            with gr.Tab("Grid", id="grid"):
                GridTab(site)
            if site.votes and site.studio.adapters:
                with gr.Tab("Blind test", id="blind"):
                    BlindTab(site, site.votes, page)
            with gr.Tab("Training runs", id="runs"):
                runs_tab(site.runs)
    # A closed API: every request goes through the queue and its limits.
    page.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def launch_settings(hosts: KnownHosts | None = None) -> dict[str, Any]:
    """Arguments of `launch` that the page needs to look right and to be safe.

    Args:
        hosts: Names that it may be asked for under. Default: those of this machine.
    """
    return {
        "app_kwargs": {"middleware": [Middleware(Guard, hosts=hosts or KnownHosts())]},
        "theme": _theme(),
        "css_paths": [Path(__file__).with_name("style.css")],
        "footer_links": ["api"],
        "strict_cors": True,
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "max_file_size": "1mb",  # nothing is uploaded: see `Guard`
    }


def _theme() -> gr.themes.ThemeClass:
    """Fonts of the visitor's own system, and small print that is dark or light enough to be read."""
    theme = gr.themes.Base(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )
