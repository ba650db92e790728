"""`flatlora-sheet`, `python -m flatlora_diffusion.sheet`: lay pictures out in a contact sheet."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.sheet.command import main


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
