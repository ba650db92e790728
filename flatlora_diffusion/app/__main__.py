"""`flatlora-app`, `python app.py`: methods side by side in a browser."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import NoReturn

from flatlora_diffusion.app.flags import parse_app_arguments
from flatlora_diffusion.app.imports import do_without, without_stubs
from flatlora_diffusion.app.proxies import keep_own_page_off_proxies
from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.extras import import_extra


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve the page."""
    given = parse_app_arguments(arguments)
    # After parsing: --help and bad flags answer at once. What is imported stays: looking for garbage in it
    # would take a second, and time again later.
    gc.disable()
    keep_own_page_off_proxies(given.host)
    with without_stubs():
        import_extra("gradio", "app.py")
    if not given.base and not given.run:
        do_without("bitsandbytes")  # libraries import it where it is, and the demo base isn't in few bits
    from flatlora_diffusion.app.serve import serve

    gc.freeze()
    gc.enable()
    serve(given)


def run() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(main)


if __name__ == "__main__":
    run()
