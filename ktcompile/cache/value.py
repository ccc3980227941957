"""Least value first: the chance that a block is used again soon, times what that saves.

How likely a use is falls with the time since the last one, as 1 / time: so often it was seen of files, pages and
prompts. How likely it is at all differs by how often a block was used before, and is learned: of each kind of blocks
the uses are counted, and the logarithm of the time that went by without one. Blocks that went are watched on for as
long as there is room for their keys, or only what is kept would be learned of. Decision 24 has the sources.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
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
# Of blocks that went, as many are watched as there are blocks, times this, and at most so many.
_WATCHED, _MOST_WATCHED = 2.0, 1 << 18
# What is younger than this share of that time does not go, so what happens to it says nothing of those that may: a few
# blocks that are used all the time would speak for all.
_YOUNG = 0.25
# A kind counts as the average of all until it has this much evidence; evidence is halved each so many observations.
_PRIOR, _HALF_LIFE = 200.0, 10_000
_LEARN_EVERY = 500
# Kinds count as alike up to this factor, since where they are least recently used first is best.
_DOUBT = 1.5


class Value(Generic[K]):
    """The rule of `value`. worth: what a hit saves."""

    groups = _USES * (len(_POSITIONS) + 1)

    def __init__(self, worth: Worth | None = None) -> None:
        self._worth = Worth() if worth is None else worth
        self._watched: OrderedDict[K, _Gone] = OrderedDict()
        self._present = 0
        # How long blocks stay unused until they go, on average; so far none went.
        self._stay = math.inf
        self._observed = 0
        # Blocks, here or watched, that wait for their next use, by kind and by the time of the last one.
        self._waiting: list[Counter[int]] = [Counter() for _ in range(_USES)]
        self._hits = [0.0] * _USES
        self._exposure = [0.0] * _USES
        # How much likelier than the average block one of a kind is used.
        self.odds = [1.0] * _USES

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """See `Rule`."""
        if new:
            self._present += 1
            block.worth = self._worth.of(block.position, block.size)
            gone = self._watched.pop(block.key, None)
            if gone is not None:
                self._observe(gone.uses, gone.last, now, True)
                block.uses = gone.uses + 1
            self._wait(block, block.uses, now)
        else:
            self._observe(block.uses, block.last, now, True)
            self._wait(block, block.uses + 1, now)

    def missed(self, key: K, now: float) -> None:
        """See `Rule`."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """See `Rule`."""
        self._present -= 1
        if now is None:
            self._count(block.uses, block.last, -1)
        else:
            unused = now - block.last
            self._stay = unused if self._stay == math.inf else self._stay + 0.01 * (unused - self._stay)
            self._watch(block, now)

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """See `Rule`."""
        return min(oldest, key=lambda block: (self.value(block, now), block.last))

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """A block that comes was used just now."""
        return True

    def value(self, block: Block[K], now: float) -> float:
        """Return the chance that a block is used soon, times what that is worth."""
        time = now - block.last + _SOON
        if self._stay == math.inf:
            return block.worth / time
        unused: float = (time / (time + _HORIZON * self._stay)) ** self.odds[_kind(block.uses)]
        return (1 - unused) * block.worth

    def _wait(self, block: Block[K], uses: int, now: float) -> None:
        self._count(uses, now, 1)
        place = sum(block.position >= edge for edge in _POSITIONS)
        block.group = _kind(uses) * (len(_POSITIONS) + 1) + place

    def _watch(self, block: Block[K], now: float) -> None:
        self._watched[block.key] = _Gone(block.uses, block.last)
        most = min(_MOST_WATCHED, max(64, round(_WATCHED * self._present)))
        while len(self._watched) > most:
            _, forgotten = self._watched.popitem(last=False)
            self._observe(forgotten.uses, forgotten.last, now, False)

    def _observe(self, uses: int, last: float, now: float, hit: bool) -> None:
        """Take note that a block that waited for its next use was used, or is watched no longer."""
        self._count(uses, last, -1)
        if now - last >= _YOUNG * self._stay:
            self._hits[_kind(uses)] += hit
            self._exposure[_kind(uses)] += self._exposed(now - last)
            self._observed += 1
            if self._observed % _LEARN_EVERY == 0:
                self._learn(now)

    def _count(self, uses: int, last: float, change: int) -> None:
        waiting, when = self._waiting[_kind(uses)], int(last // _SOON)
        waiting[when] += change
        if not waiting[when]:
            del waiting[when]

    def _exposed(self, time: float) -> float:
        return max(0.0, math.log((time + _SOON) / (_YOUNG * self._stay + _SOON)))

    def _learn(self, now: float) -> None:
        kept = 0.5 ** (_LEARN_EVERY / _HALF_LIFE)
        self._hits = [hits * kept for hits in self._hits]
        self._exposure = [exposure * kept for exposure in self._exposure]
        # Those that still wait count too: else only what is used soon would be known.
        exposed = [
            ended + sum(count * self._exposed(max(0.0, now - when * _SOON)) for when, count in waiting.items())
            for ended, waiting in zip(self._exposure, self._waiting, strict=True)
        ]
        hits, exposure = sum(self._hits), sum(exposed)
        if hits > 0 and exposure > 0:
            average = hits / exposure
            shares = ((h + _PRIOR * average) / (e + _PRIOR) for h, e in zip(self._hits, exposed, strict=True))
            self.odds = [_beyond_doubt(share / average) for share in shares]


class _Gone(NamedTuple):
    uses: int
    last: float


def _beyond_doubt(odds: float) -> float:
    """Return odds, nearer to 1 by the factor of doubt."""
    return max(1.0, odds / _DOUBT) if odds > 1 else min(1.0, odds * _DOUBT)


def _kind(uses: int) -> int:
    return min(uses, _USES - 1)
