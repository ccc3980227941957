"""Least value first: the chance that a block is used again soon, times what that saves.

The chance is learned of blocks that were used as often and not for as long (`reuse.py`), also of those that went, whose
keys are watched for as long as there is room: only what is kept would be known else. Decision 24 has the sources.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple

from ktcompile.cache.block import Block
from ktcompile.cache.costs import Worth
from ktcompile.cache.policy import K
from ktcompile.cache.reuse import Reuse

# Kinds of blocks: used once (when they came), twice, up to 4, 8 and 16 times, and more often.
_KINDS = 6
# Where worths differ, groups are of kinds and of positions before each of these: blocks of a group are worth about the
# same.
_POSITIONS = (1024, 2048, 4096, 8192, 16384, 32768)
# Of blocks that went, as many are watched as there are blocks, times this, and at most so many.
_WATCHED, _MOST_WATCHED = 2.0, 1 << 18


class Value(Generic[K]):
    """The rule of `value`. worth: what a hit saves. trusted: whether it chooses, or only learns."""

    def __init__(self, worth: Worth | None = None) -> None:
        self._worth = Worth() if worth is None else worth
        self._edges = _POSITIONS if self._worth.weight else ()
        # The last is of blocks whose hits save nothing.
        self.groups = _KINDS * (len(self._edges) + 1) + 1
        self.reuse = Reuse(_KINDS)
        self.trusted = False
        self._watched: OrderedDict[K, _Gone] = OrderedDict()
        self._present = 0
        # How long blocks stay unused until they go, on average; so far none went.
        self._stay = math.inf

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """See `Rule`."""
        uses = block.uses + 1
        if not new:
            self.reuse.end(_kind(block.uses), block.last, now, True)
        else:
            self._present += 1
            gone = self._watched.pop(block.key, None)
            if gone is not None:
                self.reuse.end(_kind(gone.uses), gone.last, now, True)
                block.uses = gone.uses + 1
            uses = block.uses
        self.reuse.begin(_kind(uses), now)
        self.sort(block, uses)

    def missed(self, key: K, now: float) -> None:
        """See `Rule`."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """See `Rule`."""
        self._present -= 1
        if now is None:
            self.reuse.forget(_kind(block.uses), block.last)
            return
        unused = now - block.last
        self._stay = unused if self._stay == math.inf else self._stay + 0.01 * (unused - self._stay)
        self._watched[block.key] = _Gone(block.uses, block.last)
        most = min(_MOST_WATCHED, max(64, round(_WATCHED * self._present)))
        while len(self._watched) > most:
            _, forgotten = self._watched.popitem(last=False)
            self.reuse.end(_kind(forgotten.uses), forgotten.last, now, False)

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """See `Rule`."""
        return self.least(oldest, now) if self.trusted else self.first(oldest, now)

    def least(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """Return the block of the least value."""
        return min(oldest, key=lambda block: (self.value(block, now), block.last))

    def first(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """Return a block whose hits save nothing, or else the one that was used longest ago."""
        return min(oldest, key=lambda block: (block.worth > 0, block.last, -block.position, block.place))

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """A block that comes was used just now."""
        return True

    def value(self, block: Block[K], now: float) -> float:
        """Return the chance that a block is used soon, times what that is worth.

        Soon is as long as blocks stay unused here before they go.
        """
        return self.reuse.chance(_kind(block.uses), now - block.last, self._ahead(now, block)) * block.worth

    def _ahead(self, now: float, block: Block[K]) -> float:
        return self._stay if self._stay != math.inf else now - block.last

    def sort(self, block: Block[K], uses: int) -> None:
        """Say what a block is worth, and put it among those that are worth as much and were used as often."""
        block.worth = self._worth.of(block.position, block.size)
        place = sum(block.position >= edge for edge in self._edges)
        block.group = _kind(uses) * (len(self._edges) + 1) + place if block.worth else self.groups - 1


class Shadow(Generic[K]):
    """The rule of a tier of keys alone that is kept by value. It learns nothing itself. uses: of a block by its key."""

    def __init__(self, value: Value[K], uses: Callable[[K], int]) -> None:
        self.groups = value.groups
        self._value, self._uses = value, uses

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """See `Rule`."""
        if new:
            block.uses = self._uses(block.key)
        self._value.sort(block, block.uses + (not new))

    def missed(self, key: K, now: float) -> None:
        """Nothing is kept of what is not here."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """Nothing is kept of what went."""

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """See `Rule`."""
        return self._value.least(oldest, now)

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """A block that comes was used just now."""
        return True


class _Gone(NamedTuple):
    uses: int
    last: float


def _kind(uses: int) -> int:
    return min(uses.bit_length(), _KINDS - 1)
