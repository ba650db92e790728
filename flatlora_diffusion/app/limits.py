"""Bounds of what the page takes, and how its events are queued and named."""

MAX_PROMPT = 1000
MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_SCALE = 2.0

# All that draws takes turns; who waits is told the place in the queue.
DRAWS = {"concurrency_id": "pipeline", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}
