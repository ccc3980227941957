"""Least value first: the chance that a block is used again soon, times what that saves, damped.

How likely a use is falls with the time since the last one, as 1 / time: so often it was seen of files, pages and
prompts. How likely it is at all differs by how often a block was used before, and is learned: of each kind of blocks
the uses are counted, and the logarithm of the time that went by without one. Blocks that went are watched on for as
long as there is room for their keys, or only what is kept would be learned of. Decision 24 has the sources.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, NamedTuple

from ktcompile.cache.block import Block
from ktcompile.cache.costs import Worth
from ktcompile.cache.policy import K

# Kinds of blocks: used once (when they came), twice, more often; and of each, by positions before them, those below
# each of these and those above. The second only sorts: blocks of a group must be worth about the same.
_USES = 3
_POSITIONS = (1024, 2048, 4096, 8192, 16384, 32768)
# Times below this many seconds are alike.
_SOON = 4.0
# "Soon" is as long as a block stays unused before it goes, times this.
_HORIZON = 4.0
# What a hit saves counts as this power of its seconds per byte. At 1 more seconds are saved, as late positions cost
# more, but of fewer tokens than least recently used first saves; at 0 all hits are alike.
_DAMPING = 1 / 6
# Of blocks that went, as many are watched as there are blocks, times this, and at most so many.
_WATCHED, _MOST_WATCHED = 2.0, 1 << 18
# A kind counts as the average of all until it has this much evidence; evidence is halved each so many observations.
_PRIOR, _HALF_LIFE = 500.0, 20_000
_LEARN_EVERY = 1000


class Value(Generic[K]):
    """The rule of `value`. worth: what a hit saves."""

    groups = _USES * (len(_POSITIONS) + 1)

    def __init__(self, worth: Worth | None = None) -> None:
        self._worth = Worth() if worth is None else worth
        self._watched: OrderedDict[K, _Gone] = OrderedDict()
        self._present = 0
        self._stay = 1.0
        self._observed = 0
        self._hits = [0.0] * _USES
        self._exposure = [0.0] * _USES
        # How much likelier than the average block one of a kind is used.
        self.odds = [1.0] * _USES

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """See `Rule`."""
        if new:
            self._present += 1
            block.worth = self._worth.per_byte(block.position, block.size) ** _DAMPING
            gone = self._watched.pop(block.key, None)
            if gone is not None:
                self._observe(gone.uses, now - gone.last, True)
                block.uses = gone.uses + 1
            self._sort(block, block.uses)
        else:
            self._observe(block.uses, now - block.last, True)
            self._sort(block, block.uses + 1)

    def missed(self, key: K, now: float) -> None:
        """See `Rule`."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """See `Rule`."""
        self._present -= 1
        if now is not None:
            self._stay += 0.01 * (now - block.last - self._stay)
            self._watch(block, now)

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """See `Rule`."""
        return min(oldest, key=lambda block: self.value(block, now))

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """A block that comes was used just now."""
        return True

    def value(self, block: Block[K], now: float) -> float:
        """Return the chance that a block is used soon, times what that is worth."""
        time = now - block.last + _SOON
        unused: float = (time / (time + _HORIZON * self._stay)) ** self.odds[_kind(block.uses)]
        return (1 - unused) * block.worth

    def _sort(self, block: Block[K], uses: int) -> None:
        place = sum(block.position >= edge for edge in _POSITIONS)
        block.group = _kind(uses) * (len(_POSITIONS) + 1) + place

    def _watch(self, block: Block[K], now: float) -> None:
        self._watched[block.key] = _Gone(block.uses, block.last)
        most = min(_MOST_WATCHED, max(64, round(_WATCHED * self._present)))
        while len(self._watched) > most:
            _, forgotten = self._watched.popitem(last=False)
            self._observe(forgotten.uses, now - forgotten.last, False)

    def _observe(self, uses: int, time: float, hit: bool) -> None:
        """Take note that a block was used, or not yet, so many seconds after its last use."""
        kind = _kind(uses)
        self._hits[kind] += hit
        self._exposure[kind] += math.log1p(max(0.0, time) / _SOON)
        self._observed += 1
        if self._observed % _LEARN_EVERY == 0:
            self._learn()

    def _learn(self) -> None:
        kept = 0.5 ** (_LEARN_EVERY / _HALF_LIFE)
        self._hits = [hits * kept for hits in self._hits]
        self._exposure = [exposure * kept for exposure in self._exposure]
        hits, exposure = sum(self._hits), sum(self._exposure)
        if hits > 0 and exposure > 0:
            average = hits / exposure
            self.odds = [
                (h + _PRIOR * average) / (e + _PRIOR) / average for h, e in zip(self._hits, self._exposure, strict=True)
            ]


class _Gone(NamedTuple):
    uses: int
    last: float


def _kind(uses: int) -> int:
    return min(uses, _USES - 1)
