"""The command line of the trainer."""

from flatlora_diffusion.config.command_line import parse_train_config


def main() -> None:
    """Parse the command line and train."""
    config = parse_train_config()
    from flatlora_diffusion.train.arms import train  # after parsing: --help and bad flags answer at once

    train(config)
