"""Random numbers that are functions of a seed and a position, so no state is kept and no order matters.

Philox4x64-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random words of 64 bits."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 64) ^ b ^ k, second & _MASK, (first >> 64) ^ d ^ m, first & _MASK
        k, m = (k + _WEYL[0]) & _MASK, (m + _WEYL[1]) & _MASK
    return a, b, c, d


def uniform(seed: int, stream: int, position: int) -> float:
    """Return a number in [0, 1), a multiple of 2**-53."""
    word = philox((position, 0, 0, 0), (seed & _MASK, stream))[0]
    return (word >> 11) * 2.0**-53
