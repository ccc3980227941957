"""What a policy knows of a block, and blocks in the order of their last use."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

from ktcompile.cache.policy import K

# How small an order may be and still be tidied.
_LEAST = 64


@dataclass(slots=True, eq=False)
class Block(Generic[K]):
    """A block of a tier.

    size: bytes. position: tokens before it. last: when it was used last. uses: how often after it came. pins: holds
    that keep it. place: number of its valid entry in orders; 0 while it may not go. group, worth: what a rule keeps.
    """

    key: K
    parent: K | None
    size: int
    position: int
    tenant: str
    last: float
    uses: int = 0
    pins: int = 0
    place: int = 0
    group: int = 0
    worth: float = 0.0


class Order(Generic[K]):
    """Blocks, the one that was used longest ago first; of those that were used together the last of the sequence.

    An entry whose number is not the block's `place` is stale and skipped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Block[K]]] = []
        self._most = _LEAST

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, block: Block[K]) -> None:
        """Add a block under its present place."""
        heapq.heappush(self._heap, (block.last, -block.position, block.place, block))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if _valid(entry)]
            heapq.heapify(self._heap)
            self._most = max(_LEAST, 2 * len(self._heap))

    def head(self) -> Block[K] | None:
        """Return the first block; None: there is none."""
        while self._heap and not _valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None


def heads(orders: Iterable[Order[K]]) -> list[Block[K]]:
    """Return the first block of each order that has one."""
    return [head for order in orders if (head := order.head()) is not None]


def _valid(entry: tuple[float, int, int, Block[K]]) -> bool:
    return entry[2] == entry[3].place
