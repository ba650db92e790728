"""Small pieces of HTML."""

from __future__ import annotations

import html


def progress(told: str, fraction: float | None = None) -> str:
    """A line that screen readers tell when it changes, with a bar where there is something to wait for."""
    bar = ""
    if fraction is not None:
        bar = f'<progress max="1" value="{fraction:.3f}" aria-label="Progress"></progress>'
    return f'<div class="told" role="status" aria-live="polite">{html.escape(told)}{bar}</div>'
