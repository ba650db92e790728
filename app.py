#!/usr/bin/env python
"""Base, LoRA and Flat-LoRA side by side in a browser, for the same prompt and seed. Try --help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.cli import OneLineParser, run_command
from flatlora_diffusion.errors import UserError
from flatlora_diffusion.generate import DTYPES, default_device, load_pipeline, parse_adapter
from flatlora_diffusion.page.build import build, launch_settings
from flatlora_diffusion.page.presets import DEMO
from flatlora_diffusion.page.site import Site
from flatlora_diffusion.stamp import base_name
from flatlora_diffusion.studio import Studio
from flatlora_diffusion.votes import VoteFile

PROJECT = Path(__file__).parent
DEMO_BASE = PROJECT / "assets" / "micro-sdxl"
DEMO_ADAPTERS = {"LoRA": "lora", "Flat-LoRA": "flat_lora"}


def demo_adapters(project: Path) -> dict[str, Path]:
    """The adapters that `make demo` has trained, else those that come with the project."""
    for folder in (project / "demo-output", project / "assets" / "adapters"):
        adapters = {label: folder / name for label, name in DEMO_ADAPTERS.items()}
        if all((path / "pytorch_lora_weights.safetensors").is_file() for path in adapters.values()):
            return adapters
    raise UserError(f"no adapters in {folder}: restore that folder, or give --adapter NAME=PATH")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the app."""
    parser = OneLineParser(prog="app.py", description=__doc__)
    parser.add_argument("--base", help="SDXL pipeline, a folder or hub name. Default: the demo base.")
    parser.add_argument(
        "--adapter",
        type=parse_adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="An adapter to show; may be given several times. Default: those of `make demo`, else of assets.",
    )
    parser.add_argument("--device", default=default_device(), help="Such as cuda or cpu.")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="Precision (default: fp32).")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to serve on (default: this machine only)."
    )
    parser.add_argument("--port", type=int, help="Default: the first free one from 7860.")
    parser.add_argument("--share", action="store_true", help="Also serve at a public address of Gradio's.")
    parser.add_argument(
        "--auth", type=_parse_auth, metavar="USER:PASSWORD", help="Ask visitors for these first."
    )
    parser.add_argument(
        "--votes",
        type=_parse_votes,
        default="flatlora-votes.jsonl",
        metavar="FILE",
        help="Keeps the votes of the blind test (default: flatlora-votes.jsonl in this folder).",
    )
    given = parser.parse_all(arguments)
    base = given.base or str(DEMO_BASE)
    adapters = dict(given.adapter) or demo_adapters(PROJECT)
    pipeline = load_pipeline(base, device=given.device, dtype=DTYPES[given.dtype])
    studio = Studio(pipeline, base_name(base), adapters)
    site = Site(studio, DEMO, guidance=3.0, votes=given.votes)
    page = build(site)
    _, address, _ = page.launch(
        server_name=given.host,
        server_port=given.port,
        share=given.share,
        auth=given.auth,
        prevent_thread_lock=True,
        quiet=True,
        **launch_settings(),
    )
    print(f"the page is at {address} (Ctrl-C ends it)")
    page.block_thread()


def _parse_auth(argument: str) -> tuple[str, str]:
    user, separator, password = argument.partition(":")
    if not (user and separator and password):
        raise argparse.ArgumentTypeError("must be USER:PASSWORD")
    return user, password


def _parse_votes(argument: str) -> VoteFile:
    path = Path(argument)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}; make it")
    return VoteFile(path)


if __name__ == "__main__":
    run_command(main)
