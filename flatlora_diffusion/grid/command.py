"""The command line of grids."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.grid.draw import SHEET, draw_grid
from flatlora_diffusion.grid.flags import grid_parser, read_recipe
from flatlora_diffusion.sheet.command import main as sheet_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw a grid, draw one again from its manifest, or lay out what is there."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and not arguments[0].startswith("-"):
        sheet_main(arguments)
        return
    given = vars(grid_parser().parse_all(arguments))
    output = given.get("output")
    if output is None:
        raise UserError("--output is missing; name the folder for the pictures")
    recipe = read_recipe(given)
    device = given.get("device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # they take the weights of an adapter for missing ones
    draw_grid(recipe, output, device=device)
    print(output / SHEET)
