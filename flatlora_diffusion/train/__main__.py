"""`flatlora-train`, `python train_dreambooth_flat.py`: train a LoRA or a Flat-LoRA of SDXL."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.config.command_line import parse_command
from flatlora_diffusion.config.settings import TrainConfig


def main() -> None:
    """Parse the command line and train, or print the plan."""
    command = parse_command()
    config = TrainConfig(**command.given)
    # After parsing: --help and bad flags answer at once.
    from flatlora_diffusion.train.arms import rehearse, train
    from flatlora_diffusion.train.preset import Preset

    preset = Preset(command.preset, command.given) if command.preset else None
    if not command.dry_run:
        train(config, preset=preset)
    elif told := rehearse(config, preset):
        print(told)


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
