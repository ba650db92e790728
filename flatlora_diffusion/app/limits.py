"""Bounds of what the page takes, and how its events are queued and named."""

from __future__ import annotations

from typing import Literal, TypedDict

MAX_PROMPT = 1000
MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_SCALE = 2.0


class _TakesTurns(TypedDict):
    concurrency_id: str
    concurrency_limit: int


class _Private(TypedDict):
    api_visibility: Literal["private"]


# All that draws takes turns; who waits is told the place in the queue.
DRAWS: _TakesTurns = {"concurrency_id": "pipeline", "concurrency_limit": 1}
PRIVATE: _Private = {"api_visibility": "private"}
