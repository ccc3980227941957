"""Tags in text that comes in pieces."""

from __future__ import annotations


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` are the first of `tag`, and not all of it."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
