"""How likely blocks of some kinds are used again, by the time since they were used last: a life table for each kind.

Of each wait for a use it is known how long it was and whether a use ended it, or that it goes on. Of those that lasted
until some age, the share that a use ends before the next one is the chance at that age; no law of chances is assumed.
Ages are octaves, since what matters of an age is its order. Where little is known, kinds count as alike up to a factor,
and octaves as the one before: then the chance of a use falls as 1 / time.
"""

from __future__ import annotations

import math
from collections import Counter

# Seconds that are alike, and octaves of ages from there on (194 days).
_SOON, _OCTAVES = 4.0, 22
# Waits that what is assumed counts for, and the share of waits that a use ends, in an octave, before anything is known.
_PRIOR, _SHARE = 100.0, 0.1
# After so many waits what was learned of others counts half.
_HALF_LIFE = 10_000
_LEARN_EVERY = 500


class Reuse:
    """Life tables of kinds 0 to `kinds` - 1. Times are seconds of a clock that does not run backwards."""

    def __init__(self, kinds: int) -> None:
        # Waits that a use ended and those that nobody watches any more, by kind and octave.
        self._used = [[0.0] * _OCTAVES for _ in range(kinds)]
        self._lost = [[0.0] * _OCTAVES for _ in range(kinds)]
        # Waits that go on, by kind and the time of their beginning.
        self._waiting: list[Counter[int]] = [Counter() for _ in range(kinds)]
        self._since, self._next = 0, _LEARN_EVERY
        # Of each kind the sum of hazards up to each octave.
        self._hazards: list[list[float]] = []
        self._learn(0.0)

    def begin(self, kind: int, now: float) -> None:
        """A block was used, and waits for its next use."""
        self._waiting[kind][int(now // _SOON)] += 1

    def forget(self, kind: int, last: float) -> None:
        """A block that was used at `last` waits no longer, and nothing can be learned of it."""
        waiting, when = self._waiting[kind], int(last // _SOON)
        waiting[when] -= 1
        if not waiting[when]:
            del waiting[when]

    def end(self, kind: int, last: float, now: float, used: bool) -> None:
        """A block that was used at `last` is used now, or is watched no longer."""
        self.forget(kind, last)
        (self._used if used else self._lost)[kind][_octave(now - last)] += 1
        self._since += 1
        if self._since >= self._next:
            self._learn(now)

    def chance(self, kind: int, unused: float, ahead: float) -> float:
        """Return how likely a block that was not used for `unused` seconds is used in the next `ahead` ones."""
        begin = unused / _SOON + 1
        hazards = self._hazards[kind]
        return 1 - math.exp(_up_to(hazards, math.log2(begin)) - _up_to(hazards, math.log2(begin + ahead / _SOON)))

    def _learn(self, now: float) -> None:
        kept = 0.5 ** (self._since / _HALF_LIFE)
        for table in (*self._used, *self._lost):
            table[:] = [count * kept for count in table]
        there = [self._entered(kind, now) for kind in range(len(self._used))]
        uses, waits = sum(map(sum, self._used)), sum(map(sum, there))
        share = (uses + _PRIOR * _SHARE) / (waits + _PRIOR)
        shares = []
        for octave in range(_OCTAVES):
            used = sum(table[octave] for table in self._used)
            share = (used + _PRIOR * share) / (sum(table[octave] for table in there) + _PRIOR)
            shares.append(share)
        self._hazards = [_hazards(*tables, shares) for tables in zip(self._used, there, strict=True)]
        # A look at all that waits is paid for by as many waits that ended.
        self._since, self._next = 0, max(_LEARN_EVERY, sum(map(len, self._waiting)))

    def _entered(self, kind: int, now: float) -> list[float]:
        """Return how many waits reached each octave; those that ended there without a use, or go on, count half."""
        going = [0.0] * _OCTAVES
        for when, count in self._waiting[kind].items():
            going[_octave(max(0.0, now - when * _SOON))] += count
        result, later = [0.0] * _OCTAVES, 0.0
        for octave in reversed(range(_OCTAVES)):
            used, cut = self._used[kind][octave], self._lost[kind][octave] + going[octave]
            result[octave] = later + used + cut / 2
            later += used + cut
        return result


def _hazards(used: list[float], there: list[float], shares: list[float]) -> list[float]:
    """Return sums of hazards of a kind before each octave and, last, after them all. shares: of all kinds together."""
    average = sum(shares) / len(shares)
    expected = sum(number * share for number, share in zip(there, shares, strict=True))
    odds = (sum(used) + _PRIOR * average) / (expected + _PRIOR * average)
    sums = [0.0]
    for hits, number, share in zip(used, there, shares, strict=True):
        own = (hits + _PRIOR * min(1.0, odds * share)) / (number + _PRIOR)
        sums.append(sums[-1] - math.log(1 - min(own, 0.99)))
    return sums


def _up_to(hazards: list[float], octaves: float) -> float:
    whole = int(octaves)
    if whole >= _OCTAVES:
        return hazards[-1]
    return hazards[whole] + (octaves - whole) * (hazards[whole + 1] - hazards[whole])


def _octave(age: float) -> int:
    return min(_OCTAVES - 1, int(math.log2(age / _SOON + 1)))
