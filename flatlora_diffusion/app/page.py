"""The page as a whole, and how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from flatlora_diffusion.app.blind_tab import BlindTab
from flatlora_diffusion.app.checked import CheckedBlocks
from flatlora_diffusion.app.compare_tab import CompareTab
from flatlora_diffusion.app.first import FirstComparison
from flatlora_diffusion.app.grid_tab import GridTab
from flatlora_diffusion.app.guard import Guard, KnownHosts
from flatlora_diffusion.app.limits import PRIVATE
from flatlora_diffusion.app.preview import Preview
from flatlora_diffusion.app.runs_tab import runs_tab
from flatlora_diffusion.app.shake_tab import ShakeTab
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.app.strength_tab import StrengthTab

_WAITING = 8  # requests; others are told to come back
_DAY = 86_400
_TITLE = "Flat-LoRA beside LoRA"
_DESCRIPTION = (
    "The same prompt and seed, drawn with a LoRA, a Flat-LoRA and the base: see what flatness does."
)
_HERE = Path(__file__).parent


def build(site: Site, first: FirstComparison | None = None) -> gr.Blocks:
    """The page, with its queue.

    Args:
        site: Draws.
        first: What the page opens with.
    """
    # Files that were handed out go after a day.
    with CheckedBlocks(title=_TITLE, analytics_enabled=False, delete_cache=(_DAY, _DAY)) as page:
        gr.HTML(f"<h1>{_TITLE}</h1><p>{site.introduction}</p>", elem_id="introduction")
        with gr.Tabs():
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"), gr.Column(elem_id="compare-tab"):
                CompareTab(site, page, first or FirstComparison(site))
            if site.studio.adapters:
                with gr.Tab("Shake test", id="shake", elem_id="tab-shake"):
                    ShakeTab(site)
                with gr.Tab("Strength", id="strength", elem_id="tab-strength"):
                    StrengthTab(site)
            with gr.Tab("Grid", id="grid", elem_id="tab-grid"):
                GridTab(site)
            if site.votes and site.studio.adapters:
                with gr.Tab("Blind test", id="blind", elem_id="tab-blind"):
                    BlindTab(site, site.votes, page)
            with gr.Tab("Training", id="runs", elem_id="tab-runs"):
                runs_tab(site.runs)
        page.load(None, js="() => window.flatlora.openTab()", **PRIVATE)
    # A closed API: every request goes through the queue and its limits.
    page.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def launch_settings(hosts: KnownHosts | None = None) -> dict[str, Any]:
    """Arguments of `launch` that the page needs to look right and to be safe.

    Args:
        hosts: Names that it may be asked for under. Default: those of this machine.
    """
    return {
        "app_kwargs": {
            "middleware": [
                Middleware(Guard, hosts=hosts or KnownHosts()),
                Middleware(Preview, title=_TITLE, description=_DESCRIPTION, picture="favicon.ico"),
            ]
        },
        "theme": _theme(),
        "css_paths": [_HERE / "style.css"],
        "head": f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "favicon_path": _HERE / "icon.png",
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
