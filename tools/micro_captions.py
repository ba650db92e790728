"""The captions of all pictures, as rows of one list, and the sampler that training draws them with."""

from __future__ import annotations

import torch
from micro_data import BASE_STYLES, Subject, caption

OTHER_TEMPLATES = ("a {style} emoji of {name}", "{name}, {style} style", "{style} {name}")
KEYWORDS_IN_CAPTION = 2
PLAIN_SHARE = 0.08  # captions that name no style
MAIN_SHARE = 0.5  # captions that are the main template with the first name


def plain_captions(subject: Subject) -> list[str]:
    """The captions without a style: ``an icon of red apple``."""
    return [f"an icon of {name}" for name in subject.names]


def styled_captions(style: str, subject: Subject) -> list[str]:
    """All captions of one picture; the first one is the main template with the first name.

    The others use its other names, other templates, or add two keywords:
    ``a noto icon of red apple, fruit, mac``.
    """
    texts = [caption(style, name) for name in subject.names]
    texts += [template.format(style=style, name=subject.name) for template in OTHER_TEMPLATES]
    for start in range(0, len(subject.keywords) - KEYWORDS_IN_CAPTION + 1, KEYWORDS_IN_CAPTION):
        words = subject.keywords[start : start + KEYWORDS_IN_CAPTION]
        texts.append(", ".join([caption(style, subject.name), *words]))
    return texts


class Captions:
    """All captions of all subjects.

    Attributes:
        texts: the captions; those of one (style, subject), then those of the next.
        first: (styles + 1, subjects) the row of the first caption; the last "style" is no style.
    """

    def __init__(self, subjects: list[Subject]):
        self.texts: list[str] = []
        first, counts = [], []
        for style in (*BASE_STYLES, None):
            for subject in subjects:
                texts = styled_captions(style, subject) if style else plain_captions(subject)
                first.append(len(self.texts))
                counts.append(len(texts))
                self.texts += texts
        shape = (len(BASE_STYLES) + 1, len(subjects))
        self.first = torch.tensor(first).view(shape)
        self._counts = torch.tensor(counts).view(shape)

    def sample(
        self, styles: torch.Tensor, subjects: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """One caption row for each picture (style index, subject index)."""
        draws = torch.rand(3, len(styles), generator=generator)
        kinds = torch.where(draws[0] < PLAIN_SHARE, len(BASE_STYLES), styles)
        others = (draws[1] * self._counts[kinds, subjects]).long()
        return self.first[kinds, subjects] + torch.where(draws[2] < MAIN_SHARE, 0, others)
