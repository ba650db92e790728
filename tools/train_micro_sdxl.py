"""Train the micro SDXL of ``assets/micro-sdxl`` from scratch on a CPU: ``tools/train_micro_sdxl.py all``.

Every stage can be killed at any time and run again: it resumes from its last checkpoint, and ends when its
budget of training time is spent. ``export`` writes the weights as they are, also in the middle of a stage.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from micro_autoencoder import cache_latents, train_autoencoder
from micro_data import build
from micro_export import draw_sheet, export
from micro_text import cache_embeddings, train_text
from micro_unet import train_unet

ASSETS = Path(__file__).resolve().parent.parent / "assets"
STAGES = ("data", "autoencoder", "text", "unet", "export")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "micro-sdxl", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, default=ASSETS / "micro-sdxl", metavar="DIR")
    parser.add_argument(
        "--minutes",
        type=float,
        nargs=3,
        default=(30, 10, 120),
        metavar=("AUTOENCODER", "TEXT", "UNET"),
        help="training time of the three stages (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run one stage, or all of them in their order."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # Tiny moments of Adam become denormal numbers, with which some CPUs compute twenty times slower.
    torch.set_flush_denormal(True)
    work, (autoencoder_minutes, text_minutes, unet_minutes) = arguments.work, arguments.minutes
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        if stage == "data":
            build(work / "raw", work)
        elif stage == "autoencoder":
            cache_latents(train_autoencoder(work, autoencoder_minutes), work)
        elif stage == "text":
            train_text(work, text_minutes)
            cache_embeddings(work)
        elif stage == "unet":
            train_unet(work, unet_minutes)
        else:
            export(work, arguments.output)
            draw_sheet(arguments.output, work / "sheet.png")


if __name__ == "__main__":
    main()
