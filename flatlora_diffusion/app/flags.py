"""The command line of the app. It imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.adapter.mix import parse_source
from flatlora_diffusion.common.command import DTYPE_NAMES, OneLineParser, invoked_as


def parse_app_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of `app.py`.

    Raises:
        UserError: An unknown flag or a bad value.
    """
    parser = OneLineParser(
        prog=invoked_as("app.py"),
        description="Serve a page that draws the same prompt and seed with an SDXL base and its adapters.",
    )
    parser.add_argument(
        "--base",
        help="SDXL pipeline: a folder, hub name or .safetensors file. Default: that of the runs, else the "
        "demo base.",
    )
    parser.add_argument(
        "--adapter",
        type=parse_source,
        action="append",
        default=[],
        metavar="NAME=PATH[@SCALE][+PATH...]",
        help="An adapter to show, a file or its folder; may be given several times. Several at once: "
        "mix=style.safetensors@0.8+subject.safetensors@0.6. Without --adapter and "
        "--run, those that `make demo` has trained, else those that come with the project.",
    )
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="Output folder of a training run: its adapters and curves; may be given several times.",
    )
    parser.add_argument("--device", help="Such as cuda or cpu. Default: the accelerator at hand.")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="Precision (default: fp32).")
    parser.add_argument(
        "--caption_chunks",
        type=_count,
        default=1,
        metavar="N",
        help="Read prompts in N pieces, of 75 tokens for SDXL (default: 1), as in training.",
    )
    parser.add_argument(
        "--transparent",
        action="store_true",
        help="Take the flat ground of each picture away, from the border inwards: PNGs with alpha.",
    )
    parser.add_argument(
        "--votes",
        type=Path,
        default=Path("flatlora-votes.jsonl"),
        metavar="FILE",
        help="Where the votes of the blind test are kept (default: flatlora-votes.jsonl).",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to serve on (default: 127.0.0.1, this machine alone)."
    )
    parser.add_argument("--port", type=_port, help="Default: the first free one from 7860.")
    parser.add_argument(
        "--known_host",
        action="append",
        default=[],
        metavar="NAME",
        help="A name that the page is asked for under, such as a reverse proxy's; may be given several "
        "times. Known without it: numbers, localhost, this machine's name, --host and that of --share.",
    )
    parser.add_argument("--share", action="store_true", help="Serve at a public address of Gradio's, too.")
    parser.add_argument("--auth", type=_auth, metavar="USER:PASSWORD", help="Ask visitors for these first.")
    return parser.parse_all(arguments)


def _auth(argument: str) -> tuple[str, str]:
    user, separator, password = argument.partition(":")
    if not (user and separator and password):
        raise argparse.ArgumentTypeError("must be USER:PASSWORD")  # and not what was given: it's a secret
    return user, password


def _count(argument: str) -> int:
    if not argument.isdecimal() or not int(argument):
        raise argparse.ArgumentTypeError(f"{argument}: must be a whole number from 1")
    return int(argument)


def _port(argument: str) -> int:
    if not argument.isdecimal() or not 0 < int(argument) < 2**16:
        raise argparse.ArgumentTypeError(f"{argument}: must be a whole number from 1 to 65535")
    return int(argument)
