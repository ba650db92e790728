"""`flatlora-captions`, `python -m flatlora_diffusion.captions`: captions, written and checked."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.data.caption_command import main


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
