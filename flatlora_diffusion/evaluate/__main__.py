"""`flatlora-evaluate`, `python -m flatlora_diffusion.evaluate`: measure what adapters change."""

from typing import NoReturn

from flatlora_diffusion.common.command import run_command


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(_main)


def _main() -> None:
    # Inside: imports, which take seconds, are interrupted and report their errors as the work does.
    from flatlora_diffusion.evaluate.command import main

    main()


if __name__ == "__main__":
    run()
