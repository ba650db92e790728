"""Grids of pictures, prompts x seeds x methods: the plan, the recipe that draws it again, the drawing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatlora_diffusion.grid.draw import draw_cells, draw_grid

__all__ = ["draw_cells", "draw_grid"]


def __getattr__(name: str) -> Any:
    # When first used: the command line answers before torch is imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flatlora_diffusion.grid import draw

    return getattr(draw, name)
