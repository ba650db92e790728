"""`flatlora-kohya`, `python -m flatlora_diffusion.kohya`: adapter files to kohya's format and back."""

from typing import NoReturn

from flatlora_diffusion.adapter.command import main
from flatlora_diffusion.common.command import run_command


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
