"""Limits on what a visitor may send, and on how many may wait."""

MAX_BYTES = 5_000_000
"""Largest uploaded file."""

QUEUE_SIZE = 32
"""Most visitors in the queue; the next one is told that the page is busy."""
