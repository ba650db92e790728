"""Train the demo base (``assets/micro-sdxl``, ``assets/micro-clip``) from scratch, on a CPU or a GPU.

Each stage is one command; several can be named, and ``all`` runs them in their order. A stage can be killed
at any time: run again, it goes on from its last checkpoint, and one that is finished is left alone. ``score``
and ``export`` take the weights as they are, also in the middle of a stage. Where the checkpoints are lost,
``--start`` goes on with the UNet from what ``export`` wrote.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from micro_autoencoder import cache_latents, train_autoencoder
from micro_clip import train_clip
from micro_data import build
from micro_export import adopt, export
from micro_score import score
from micro_text import train_text
from micro_training import is_adopted
from micro_unet import train_unet

ASSETS = Path(__file__).resolve().parent.parent / "assets"
STEPS = {"autoencoder": 2000, "clip": 300, "text": 1800, "unet": 8400}
TRAINING = {"autoencoder": train_autoencoder, "clip": train_clip, "text": train_text, "unet": train_unet}
STAGES = ("data", *STEPS, "score", "export")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="+", choices=(*STAGES, "all"), metavar="STAGE", help=f"{STAGES} or all"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "micro-sdxl", metavar="DIR"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, metavar="DIR", help="where to export to")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from what was exported to DIR")
    parser.add_argument("--steps", type=int, help=f"length of a training stage (default: of {STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def run_stage(stage: str, work: Path, assets: Path, steps: int | None, device: torch.device) -> None:
    """Run one stage.

    Args:
        stage: one of `STAGES`.
        work: the folder of downloads, checkpoints and caches.
        assets: where ``export`` writes.
        steps: the length of a training stage; None for the one in `STEPS`.
        device: where training runs.
    """
    if stage == "data":
        build(work / "raw", work)
    elif stage in TRAINING:
        # What only these two stages train isn't exported, so an export has them finished.
        if stage not in ("clip", "text") or not is_adopted(work, stage):
            TRAINING[stage](work, steps or STEPS[stage], device)
        if stage == "autoencoder":
            cache_latents(work)
    elif stage == "score":
        score(work)
    else:
        export(work, assets)


def main() -> None:
    """Run the stages."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # Tiny moments of Adam become denormal numbers, with which some CPUs compute twenty times slower.
    torch.set_flush_denormal(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.start:
        adopt(arguments.work, arguments.start)
    for stage in STAGES if "all" in arguments.stages else arguments.stages:
        run_stage(stage, arguments.work, arguments.assets, arguments.steps, arguments.device)


if __name__ == "__main__":
    main()
