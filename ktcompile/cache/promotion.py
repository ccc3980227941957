"""Blocks that are on their way to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktcompile.cache.block_id import BlockId


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of a promotion. tiers: of each block that is whole on the device, from the first on; the others are
    misses. bytes, seconds: by tier, the latter of the threads that did it."""

    tiers: tuple[str, ...]
    bytes: dict[str, int]
    seconds: dict[str, float]


class Promotion:
    """Blocks that are copied to blocks of the device, which nobody else may use until `result` has given what came.

    deadline: by the clock, from which on blocks that are not there are misses.
    """

    def __init__(
        self, blocks: Sequence[BlockId], targets: Sequence[int], clock: Callable[[], float], deadline: float
    ) -> None:
        self.blocks, self.targets, self.deadline = tuple(blocks), tuple(targets), deadline
        self._clock = clock
        self._lock = threading.Lock()
        self._over = threading.Condition(self._lock)
        self._wanted = len(self.blocks)  # blocks before this may still be whole
        self._pending = len(self.blocks)
        self._tiers: list[str | None] = [None] * len(self.blocks)
        self._bytes: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._result: Loaded | None = None
        self.cancelled = False

    def wants(self, i: int) -> bool:
        """Return whether block i is still of use."""
        return self._result is None and i < self._wanted and self._clock() < self.deadline

    def fill(self, i: int, tier: str, size: int, seconds: float, copy: Callable[[int], None]) -> bool:
        """Copy block i to its place, if that is still wanted. seconds: what reading it took.

        copy: is given the block of the device; the end of the promotion waits for it, and nothing is copied after that.
        """
        with self._lock:
            if not self.wants(i):
                self._end_one()
                return False
            begin = self._clock()
            copy(self.targets[i])
            self._tiers[i] = tier
            self._bytes[tier] = self._bytes.get(tier, 0) + size
            self._seconds[tier] = self._seconds.get(tier, 0.0) + seconds + self._clock() - begin
            self._end_one()
            return True

    def fail(self, i: int) -> None:
        """Note that block i is a miss, and so all behind it."""
        with self._lock:
            self._wanted = min(self._wanted, i)
            self._end_one()

    def result(self) -> Loaded | None:
        """Return what came, None while blocks are on their way and the deadline is not reached. Blocks of the device
        are the caller's again from then on."""
        with self._lock:
            if self._result is None and (self._is_over() or self._clock() >= self.deadline):
                tiers = self._tiers[: self._wanted]
                hole = tiers.index(None) if None in tiers else len(tiers)
                self._result = Loaded(tuple(t for t in tiers[:hole] if t), self._bytes, self._seconds)
            return self._result

    def wait(self, seconds: float) -> None:
        """Return when `result` has what came, after `seconds` at the latest."""
        with self._over:
            self._over.wait_for(self._is_over, min(seconds, max(0.0, self.deadline - self._clock())))

    def cancel(self) -> None:
        """Make all blocks misses. A copy that has begun is waited for."""
        with self._lock:
            self.cancelled = self._result is None
            self._result = self._result or Loaded((), {}, {})

    def _is_over(self) -> bool:
        return not self._pending or all(tier is not None for tier in self._tiers[: self._wanted])

    def _end_one(self) -> None:
        self._pending -= 1
        if self._is_over():
            self._over.notify_all()
