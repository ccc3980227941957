"""How often keys were seen lately, in little memory and about right."""

from __future__ import annotations

from collections.abc import Hashable

_ROWS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MOST = 15
_HALVED = bytes(min(n, _MOST) // 2 for n in range(256))
_WORD = (1 << 64) - 1


class Sketch:
    """A count-min sketch for about `keys` keys: 4 bytes for each, counts to 15, halved after 10 sightings of each."""

    def __init__(self, keys: int) -> None:
        self._bits = max(6, (keys - 1).bit_length())
        self._rows = [bytearray(1 << self._bits) for _ in _ROWS]
        self._left = self._sample = 10 << self._bits

    def add(self, key: Hashable) -> None:
        """Count a sighting of a key."""
        places = self._places(key)
        least = min(row[place] for row, place in zip(self._rows, places, strict=True))
        if least < _MOST:
            for row, place in zip(self._rows, places, strict=True):
                if row[place] == least:
                    row[place] = least + 1
        self._left -= 1
        if not self._left:
            self._rows = [row.translate(_HALVED) for row in self._rows]
            self._left = self._sample // 2

    def count(self, key: Hashable) -> int:
        """Return how often a key was seen: never too few until counts were halved, sometimes too many."""
        return min(row[place] for row, place in zip(self._rows, self._places(key), strict=True))

    def _places(self, key: Hashable) -> list[int]:
        # Digests are random already, and the same in each process, which `hash` of bytes is not.
        number = int.from_bytes(key[:8], "little") if isinstance(key, bytes) else hash(key)
        number = (number ^ number >> 32) * 0xD6E8FEB86659FD93 & _WORD
        number ^= number >> 32
        return [(number * factor & _WORD) >> (64 - self._bits) for factor in _ROWS]
