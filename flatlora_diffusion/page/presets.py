"""Prompts to choose from: what an adapter should do, and what it should leave alone."""

from __future__ import annotations

DEMO = {
    "Subjects that were never trained": [
        "a fluent 3d icon of tomato",
        "a fluent 3d icon of soccer ball",
        "a fluent 3d icon of cat face",
        "a fluent 3d icon of red heart",
    ],
    "Trained icons": [
        "a fluent 3d icon of red apple",
        "a fluent 3d icon of grinning face",
        "a fluent 3d icon of fox",
    ],
    "The base's own styles: is anything forgotten?": [
        "a noto icon of red heart",
        "a twemoji icon of grinning face",
        "a noto icon of tomato",
    ],
}
