"""The command line of grids."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flatlora_diffusion.common.command import hide_progress_bars
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.processes import Processes, joined
from flatlora_diffusion.grid.flags import grid_parser
from flatlora_diffusion.sheet.command import main as sheet_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw a grid, draw one again from its manifest, or lay out what is there."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and not arguments[0].startswith("-"):
        sheet_main(arguments)
        return
    with joined() as processes:
        _draw(arguments, processes)


def _draw(arguments: Sequence[str], processes: Processes) -> None:
    """Draw the grid that the flags ask for, this process its share of it."""
    given = vars(grid_parser().parse_all(arguments))
    output = given.get("output")
    if output is None:
        raise UserError("--output is missing; name the folder for the pictures")
    # After parsing: --help and bad flags answer at once.
    from flatlora_diffusion.common.devices import checked_device, out_of_memory_as_error
    from flatlora_diffusion.grid.draw import SHEET_NAME, draw_grid
    from flatlora_diffusion.grid.request import at_base_size, read_recipe

    recipe = at_base_size(read_recipe(given), given)
    device = checked_device(given.get("device"))
    hide_progress_bars()
    with out_of_memory_as_error(
        f"while the grid was drawn: what is in {output} stays, and a smaller --batch_size goes on with it; "
        "--dtype bf16 or a smaller --resolution, into another folder, need less too"
    ):
        draw_grid(recipe, output, device=device, processes=processes)
    if processes.is_main:
        print(output / SHEET_NAME)
