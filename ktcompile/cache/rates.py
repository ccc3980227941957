"""How fast tiers give blocks and prompts are computed, as measured, and what that says of a load."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ktcompile.cache.costs import Load, Recompute, saved
from ktcompile.cache.promotion import Loaded

# How much the newest value counts in an average of the last.
_WEIGHT_OF_NEWEST = 0.2
# A tier that was passed over is believed to be so much faster than before, or it would be passed over for ever.
_FORGIVEN = 1.1
# A load may take as long as computing, but at least so many seconds: what was measured is no more than an average.
_LEAST_SECONDS = 1.0


class Rates:
    """Of the tiers behind one device. block_bytes: of a block of `block_size` tokens."""

    def __init__(self, block_size: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._block_size = block_size
        self._bytes_per_second: dict[str, float] = {}

    def note(self, loaded: Loaded) -> None:
        """Take in what a promotion brought."""
        for tier, size in loaded.bytes.items():
            newest = size / max(loaded.seconds[tier], 1e-9)
            self._bytes_per_second[tier] = smoothed(self._bytes_per_second.get(tier), newest)

    def worth_loading(self, tiers: Sequence[str], first: int, recompute: Recompute | None) -> int:
        """Return how many of the blocks from number `first` on to load, of which `tiers` says where they are.

        Blocks of one tier that follow each other are loaded all or not at all. recompute: None: not known yet, so all.
        """
        if recompute is None:
            return len(tiers)
        best, most, count, gain = 0, 0.0, 0, 0.0
        for tier, same in groupby(tiers):
            number = len(list(same))
            load = Load(0.0, self._bytes_per_second.get(tier, float("inf")))
            begin, end = ((first + i) * self._block_size for i in (count, count + number))
            gain += saved(recompute, load, begin, end, number * self.block_bytes)
            count += number
            if gain > most:
                best, most = count, gain
        for tier in set(tiers[best:]) & self._bytes_per_second.keys():
            self._bytes_per_second[tier] *= _FORGIVEN
        return best

    def seconds(self, count: int, first: int, recompute: Recompute | None) -> float | None:
        """Return how long a load of `count` blocks may take; None: as long as any."""
        if recompute is None:
            return None
        begin, end = (i * self._block_size for i in (first, first + count))
        return max(_LEAST_SECONDS, recompute.seconds(begin, end))


def smoothed(before: float | None, newest: float) -> float:
    """Return a moving average of what is measured again and again; None: nothing was so far."""
    return newest if before is None else before + _WEIGHT_OF_NEWEST * (newest - before)
