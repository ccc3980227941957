"""The policy of `value`: least value first, as long as that finds more than least recently used first would.

The rule that is not in charge plays along with keys alone: it has the same requests and the same room, and of each
request it is known how many blocks it would have found more or fewer. It takes over where its lead is not by chance,
counted by requests, since blocks of a request are found together.
"""

from __future__ import annotations

from typing import Generic

from ktcompile.cache.block import Block
from ktcompile.cache.leaf_first import LeafFirst
from ktcompile.cache.lru import Lru
from ktcompile.cache.policy import K, Limits
from ktcompile.cache.value import Shadow, Value

# How many standard deviations of a walk by chance a lead must be.
_SURE = 3.0
# After so many requests that made a difference what was before counts half.
_MEMORY = 4000


class Lead:
    """By how much another finds more blocks than we do, and whether that is sure."""

    def __init__(self) -> None:
        self._now = float("-inf")
        self._request = 0
        self.blocks, self._squares, self._requests = 0.0, 0.0, 0

    def add(self, blocks: int, now: float) -> bool:
        """Count `blocks` that only the other found, or, below 0, only we did; return whether it leads for sure.

        It is looked at when a request is over, which is when the next one comes.
        """
        over = now != self._now and self._request != 0
        if over:
            self.blocks += self._request
            self._squares += self._request**2
            self._requests += 1
            self._request = 0
            if self._requests == _MEMORY:
                self.blocks, self._squares, self._requests = self.blocks / 2, self._squares / 2, _MEMORY // 2
        self._now = now
        self._request += blocks
        return over and self.blocks > _SURE * self._squares**0.5


class Contest(LeafFirst[K], Generic[K]):
    """A `Policy` by value, or by time of use where that finds more. It begins with the latter."""

    def __init__(self, limits: Limits, value: Value[K]) -> None:
        super().__init__(limits, value)
        self.value = value
        self._begin()

    def insert(
        self, key: K, parent: K | None, size: int, position: int, now: float, tenant: str = ""
    ) -> tuple[bool, list[K]]:
        """See `Policy`."""
        result = super().insert(key, parent, size, position, now, tenant)
        if key not in self._other:
            self._other.insert(key, parent, size, position, now, tenant)
        return result

    def touch(self, key: K, now: float) -> None:
        """See `Policy`."""
        block, there = self._blocks.get(key), key in self._other
        if self._lead.add(there - (block is not None), now):
            self.value.trusted = not self.value.trusted
            self._begin()
            there = block is not None
        super().touch(key, now)
        if there:
            self._other.touch(key, now)
        elif block is not None:
            self._other.insert(key, block.parent, block.size, block.position, now, block.tenant)

    def evict(self, size: int, now: float) -> list[K]:
        """See `Policy`."""
        self._other.evict(size, now)
        return super().evict(size, now)

    def expire(self, now: float) -> list[K]:
        """See `Policy`."""
        self._other.expire(now)
        return super().expire(now)

    def remove(self, key: K) -> bool:
        """See `Policy`."""
        self._other.remove(key)
        return super().remove(key)

    def _begin(self) -> None:
        """Let the rule that is not in charge play along, from what is here."""
        self._lead = Lead()
        self._other: LeafFirst[K] = LeafFirst(
            self.limits, Lru() if self.value.trusted else Shadow(self.value, self._uses)
        )
        for block in sorted(self._blocks.values(), key=lambda block: (block.last, block.position)):
            self._other.insert(block.key, block.parent, block.size, block.position, block.last, block.tenant)

    def _uses(self, key: K) -> int:
        block: Block[K] | None = self._blocks.get(key)
        return 0 if block is None else block.uses
