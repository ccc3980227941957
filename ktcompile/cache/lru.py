"""Least recently used first."""

from __future__ import annotations

from collections.abc import Sequence

from ktcompile.cache.block import Block
from ktcompile.cache.policy import K


class Lru:
    """The rule of `lru`: one group, whose oldest block goes."""

    groups = 1

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """Nothing is kept of uses but their time."""

    def missed(self, key: K, now: float) -> None:
        """Nothing is kept of what is not here."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """Nothing is kept of what went."""

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """Return the block that was used longest ago."""
        return oldest[0]

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """Whatever comes is newer than what is here."""
        return True
