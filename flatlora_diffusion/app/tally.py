"""The tally of a blind test in words that need no statistics, and as a bar."""

from __future__ import annotations

import html

from flatlora_diffusion.app.votes import Tally

_FEW = 30  # decided votes: half of the interval's width is 17% of the whole then


def tally_html(tally: Tally) -> str:
    """Counts, share with its interval as text and as a bar, and how likely it is chance."""
    one, other = html.escape(tally.one), html.escape(tally.other)
    votes = tally.decided + tally.ties
    lines = [
        f"<h3>{one} against {other}: {_count(votes, 'vote')}</h3>",
        f"<p>{one} better: {tally.one_wins}. {other} better: {tally.other_wins}. "
        f"No difference: {tally.ties}.</p>",
    ]
    if tally.share is None:
        lines.append("<p>Nobody has preferred either yet, so there is no share to tell.</p>")
    else:
        lines += [_bar(tally), f"<p>{html.escape(_share(tally))}</p>", f"<p>{html.escape(chance(tally))}</p>"]
    return f'<section class="tally">{"".join(lines)}</section>'


def chance(tally: Tally) -> str:
    """What the p-value and the number of votes mean."""
    p = tally.p_value
    if p == 1:
        often = "every such test"
    elif p >= 0.01:
        often = f"{min(round(100 * p), 99)}% of such tests"
    else:
        often = "fewer than 1% of such tests"
    number = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    verdict = "this could well be chance"
    for bound, stronger in (
        (0.2, "chance is not ruled out"),
        (0.05, "chance alone is unlikely"),
        (0.01, "chance alone is very unlikely"),
    ):
        if p < bound:
            verdict = stronger
    said = f"If neither were better, {often} would be at least as one-sided (sign test, {number}): {verdict}."
    if tally.decided < _FEW:
        said += f" {_count(tally.decided, 'decided vote')} can show only large differences."
    return said + " The p-value holds where the number of votes was fixed beforehand."


def _share(tally: Tally) -> str:
    low, high = tally.interval
    return (
        f"{tally.one} won {tally.share:.0%} of {_count(tally.decided, 'decided vote')}; "
        f"95% interval (Wilson): {low:.0%} to {high:.0%}."
    )


def _bar(tally: Tally) -> str:
    low, high = (100 * end for end in tally.interval)
    return (
        f'<div class="share" role="img" aria-label="{html.escape(_share(tally))}">'
        f'<span class="won" style="width: {tally.share:.2%}"></span><span class="half"></span>'
        f'<span class="interval" style="left: {low:.2f}%; width: {high - low:.2f}%"></span></div>'
        '<div class="share-scale" aria-hidden="true"><span>0%</span><span>50%</span><span>100%</span></div>'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
