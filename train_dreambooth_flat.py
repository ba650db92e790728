#!/usr/bin/env python
"""DreamBooth LoRA training of SDXL with Flat-LoRA. Try --help."""

from flatlora_diffusion.cli import parse_train_config, run_command


def main() -> None:
    """Parse the command line and train."""
    config = parse_train_config()
    from flatlora_diffusion.train import train  # after parsing: --help and bad flags answer at once

    train(config)


if __name__ == "__main__":
    run_command(main)
