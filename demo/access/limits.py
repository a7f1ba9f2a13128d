"""How much a visitor may bring, and how many may wait."""

MAX_BYTES = 5_000_000
"""Of an uploaded file."""


QUEUE_SIZE = 32
"""Visitors that may wait; the next one is told that the page is busy."""
