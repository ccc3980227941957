"""How often what happened in the tiers, by name."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

# Blocks, unless another unit is named. `host` and `disk` are the tier that it happened in.
NAMES = frozenset(
    {f"{tier}_{what}" for tier in ("host", "disk") for what in ("hit", "stored", "evicted", "bytes_in", "bytes_out")}
    | {f"{tier}_verify_failed" for tier in ("host", "disk")}
    | {f"promoted_{tier}" for tier in ("host", "disk")}  # into a block of the device
    | {f"promote_{tier}_microseconds" for tier in ("host", "disk")}  # of the threads that did it
    | {
        "queries",  # that `lookup` was asked for
        "miss",  # of those: the first that was nowhere, and those behind it
        "demoted",  # out of a block of the device
        "dropped",  # not stored as a queue was full
        "refused",  # not stored as the policy, the parent's absence or a full disk forbade it
        "load_failed",  # a block that was said to be there could not be read in full
        "load_late",  # at the deadline of a promotion
        "load_cancelled",  # since its request ended, or gave up its blocks
        "disk_quarantined",
        "disk_stale",  # removed at start: another version, or out of reach
        "disk_io_error",  # operations
        "disk_breaker_opened",  # times
    }
)


class Counters:
    """Numbers that only grow, which any thread may add to.

    watch: is told of each name and number as it is added, by the thread that does it, which may hold locks.
    """

    def __init__(self) -> None:
        self.watch: Callable[[str, int], None] | None = None
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, name: str, number: int = 1) -> None:
        """Add to a number."""
        assert name in NAMES, f"{name} is no counter"
        with self._lock:
            self._values[name] += number
        if number and self.watch is not None:
            self.watch(name, number)

    def snapshot(self) -> dict[str, int]:
        """Return all numbers as they are now."""
        with self._lock:
            return {name: self._values[name] for name in sorted(NAMES)}
