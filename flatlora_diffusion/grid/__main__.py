"""`flatlora-grid`, `python -m flatlora_diffusion.grid`: draw a grid of prompts x seeds x methods."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.grid.command import main


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
