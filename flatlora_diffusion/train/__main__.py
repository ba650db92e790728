"""`flatlora-train`, `python train_dreambooth_flat.py`: train a LoRA or a Flat-LoRA of SDXL."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.config.command_line import parse_train_config


def main() -> None:
    """Parse the command line and train."""
    config = parse_train_config()
    from flatlora_diffusion.train.arms import train  # after parsing: --help and bad flags answer at once

    train(config)


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
