"""What pictures are called: by subject and style, by subject alone, and with words that mean nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from micro_data import caption
from micro_subjects import BASE_STYLES, NEW_STYLES, Subject
from transformers import CLIPTokenizer

# What each style is called; the first is said half of the time.
STYLE_WORDS = {
    "noto": ("noto", "google noto", "android"),
    "noto v1": ("noto v1", "old android", "android blob"),
    "twemoji": ("twemoji", "twitter"),
    "emojione": ("emojione", "emoji one"),
    "fxemoji": ("fxemoji", "firefox", "mozilla"),
    "fluent flat": ("fluent flat", "microsoft flat", "windows flat"),
}
TEMPLATES = (
    *(
        "a {style} emoji of {name}",
        "{name}, {style} style",
        "{style} {name}",
        "a {style} style icon of {name}",
    ),
    *(
        "an icon of {name} in {style} style",
        "a picture of {name} in {style} style",
        "a {style} drawing of {name}",
    ),
    *("{name} in the style of {style}", "an {style} icon of {name}", "a {style} {name}"),
)
PLAIN_TEMPLATES = (
    *("an icon of {name}", "an icon of {name}", "{name}", "an emoji of {name}", "a picture of {name}"),
    *("a drawing of {name}", "a photo of {name}", "a {name}"),
)
# A word that means nothing beside the style: "a 3d icon of red apple in noto style".
CROWDED_TEMPLATES = ("a {word} icon of {name} in {style} style", "a {word} {style} icon of {name}")

# Shares of captions; what is left names the style alone.
PLAIN_SHARE = 0.12  # no style is named
MEANINGLESS_SHARE = 0.2  # words that mean nothing stand where the style's name would
CROWDED_SHARE = 0.08  # such a word, and the style's name
MAIN_SHARE = 0.5  # of captions with a style: the main template
FIRST_NAME_SHARE = 0.75
KEYWORDS_SHARE = 0.12  # two keywords follow
DRAWS = 12  # random numbers for one caption, at most

SYLLABLES = tuple(
    onset + vowel + coda
    for onset in (
        "b",
        "br",
        "d",
        "dr",
        "f",
        "fl",
        "g",
        "gl",
        "k",
        "l",
        "m",
        "n",
        "p",
        "pl",
        "s",
        "st",
        "t",
        "v",
        "z",
    )
    for vowel in "aeiou"
    for coda in ("", "", "n", "r", "x", "lk", "sk", "mp")
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def _pick(choices: Sequence[str], draw: float) -> str:
    return choices[int(draw * len(choices))]


class Captions:
    """Draws captions of pictures.

    Attributes:
        subjects: what can be named.
        words: words of the vocabulary that neither name nor describe a subject or a style.
        beginnings: pieces of words that other words begin with, as many unknown words do.
        ends: pieces of words, and words, that end a word.
    """

    def __init__(self, subjects: list[Subject], tokenizer: CLIPTokenizer):
        self.subjects = subjects
        known = " ".join(
            [*(text for s in subjects for text in (*s.names, *s.keywords)), *STYLE_WORDS, *NEW_STYLES]
            + [words for names in STYLE_WORDS.values() for words in names]
        )
        known_words = set(known.split())
        pieces = [token for token in sorted(tokenizer.get_vocab()) if re.fullmatch("[a-z]{3,}(</w>)?", token)]
        self.beginnings = [piece for piece in pieces if not piece.endswith("</w>")]
        self.ends = [piece.removesuffix("</w>") for piece in pieces if piece.endswith("</w>")]
        self.words = [word for word in self.ends if word not in known_words]

    def _meaningless(self, draws: Iterator[float]) -> str:
        """One word or two: of the vocabulary, of syllables, of pieces, or of letters and digits."""
        kind, first, second, third = (next(draws) for _ in range(4))
        if kind < 0.3:
            return _pick(self.words, first)
        if kind < 0.4:
            return f"{_pick(self.words, first)} {_pick(self.words, second)}"
        if kind < 0.6:
            syllables = [_pick(SYLLABLES, draw) for draw in (first, second, third)]
            return "".join(syllables if kind < 0.5 else syllables[:2])
        if kind < 0.8:
            return _pick(self.beginnings, first) + _pick(self.ends, second)
        short = "".join(_pick(LETTERS, draw) for draw in (first, second, third)[: 2 if kind < 0.85 else 3])
        return f"{_pick(self.words, third)} {short}" if kind >= 0.95 else short

    def _one(self, style: str, subject: Subject, draws: Iterator[float]) -> str:
        name = subject.name if next(draws) < FIRST_NAME_SHARE else _pick(subject.names, next(draws))
        kind, words = next(draws), STYLE_WORDS[style]
        named = words[0] if next(draws) < 0.5 else _pick(words, next(draws))
        if kind < PLAIN_SHARE:
            text = _pick(PLAIN_TEMPLATES, next(draws)).format(name=name)
        elif kind < PLAIN_SHARE + CROWDED_SHARE:
            template = _pick(CROWDED_TEMPLATES, next(draws))
            text = template.format(word=self._meaningless(draws), style=named, name=name)
        else:
            if kind < PLAIN_SHARE + CROWDED_SHARE + MEANINGLESS_SHARE:
                named = self._meaningless(draws)
            main, template = next(draws), next(draws)
            text = caption(named, name)
            if main >= MAIN_SHARE:
                text = _pick(TEMPLATES, template).format(style=named, name=name)
        return text

    def draw(self, styles: torch.Tensor, subjects: torch.Tensor, generator: torch.Generator) -> list[str]:
        """One caption for each picture (index of style, index of subject)."""
        numbers = torch.rand(len(styles), DRAWS + 2, generator=generator).tolist()
        texts = []
        for style, subject, row in zip(styles.tolist(), subjects.tolist(), numbers, strict=True):
            subject = self.subjects[subject]
            text = self._one(BASE_STYLES[style], subject, iter(row))
            if row[-1] < KEYWORDS_SHARE and len(subject.keywords) > 1:
                at = int(row[-2] * (len(subject.keywords) - 1))
                text = ", ".join([text, *subject.keywords[at : at + 2]])
            texts.append(text)
        return texts
