"""How much two pictures differ, in words, and the scale of the map that shows where."""

from __future__ import annotations

import html

from flatlora_diffusion.draw.difference import Difference

_WORDS = (
    (0.5, "are all but the same"),
    (3.0, "differ a little"),
    (8.0, "differ clearly"),
    (20.0, "differ strongly"),
)
_MARKS = (0, 1, 5, 20, 50, 100)  # percent; their places on the ramp are square roots: see `difference`


def difference_text(left: str, right: str, found: Difference) -> str:
    """A sentence in words and numbers, as HTML."""
    words = next((told for bound, told in _WORDS if found.mean_percent < bound), "have little in common")
    if not found.mean_percent:
        words = "are the same, pixel for pixel"
    return (
        f"<p><strong>{html.escape(left)} and {html.escape(right)} {words}.</strong> On average colours are "
        f"{found.mean_percent:.1f}% of the full range apart; {found.changed_percent:.0f}% of the pixels "
        "differ visibly.</p>"
    )


def same_text(left: str, right: str) -> str:
    """Why there is nothing to compare: both sides are one method, or one file."""
    if left == right:
        return f"<p>Both sides are {html.escape(left)}: choose another one for a side.</p>"
    return f"<p>{html.escape(left)} and {html.escape(right)} are the same file under two names.</p>"


def scale_html() -> str:
    """The colours of a map and the differences that they stand for."""
    marks = "".join(f'<span style="left: {(mark / 100) ** 0.5:.1%}">{mark}%</span>' for mark in _MARKS)
    return (
        '<div class="map-scale" role="img" aria-label="Colours of the map: black is equal, the brighter the '
        f'more different"><div></div>{marks}</div>'
        '<p class="caption">Black: both are equal. The brighter, the more different.</p>'
    )
