"""W-TinyLFU (Einziger, Friedman and Manes, 2017): a newcomer takes a place only from what was asked for less often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from ktcompile.cache.block import Block
from ktcompile.cache.policy import K
from ktcompile.cache.sketch import Sketch

_WINDOW, _PROBATION, _PROTECTED = range(3)
# Of all bytes, and of those that are not in the window.
_WINDOW_SHARE, _PROTECTED_SHARE = 0.01, 0.8


class WTinyLfu(Generic[K]):
    """The rule of `wtinylfu`: a window of 1 % for what comes, then, in two segments, what was asked for oftener."""

    groups = 3

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sketch: Sketch | None = None
        self._bytes = [0, 0, 0]

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """See `Rule`."""
        if self._sketch is None:
            self._sketch = Sketch(max(1, self._capacity // block.size))
        self._sketch.add(block.key)
        if new:
            # As long as there is room for all, nobody has to contend for a place.
            main = self._bytes[_PROBATION] + self._bytes[_PROTECTED] + block.size
            block.group = _PROBATION if main <= (1 - _WINDOW_SHARE) * self._capacity else _WINDOW
            self._bytes[block.group] += block.size
        elif block.group == _PROBATION:
            self._move(block, _PROTECTED)

    def missed(self, key: K, now: float) -> None:
        """A block that is asked for and not here comes next, and is counted then."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """See `Rule`."""
        self._bytes[block.group] -= block.size

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """See `Rule`."""
        heads = {block.group: block for block in oldest}
        window, probation, protected = (heads.get(group) for group in (_WINDOW, _PROBATION, _PROTECTED))
        main = self._bytes[_PROBATION] + self._bytes[_PROTECTED]
        if protected is not None and self._bytes[_PROTECTED] > _PROTECTED_SHARE * main:
            self._move(protected, _PROBATION)
        victim = probation or protected
        if window is None or victim is None:
            return oldest[0]
        if self._bytes[_WINDOW] <= max(_WINDOW_SHARE * sum(self._bytes), window.size):
            return victim
        if self._count(window) <= self._count(victim):
            return window
        self._move(window, _PROBATION)
        return victim

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """What comes has a place in the window."""
        return True

    def _count(self, block: Block[K]) -> int:
        return self._sketch.count(block.key) if self._sketch is not None else 0

    def _move(self, block: Block[K], group: int) -> None:
        self._bytes[block.group] -= block.size
        self._bytes[group] += block.size
        block.group = group
