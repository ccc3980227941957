"""Replays recordings through one tier, or several that hand blocks on, without a model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktcompile.cache.costs import Load, Recompute, worth_loading
from ktcompile.cache.policy import Policy
from ktcompile.cache.recording import Asked, Recording


@dataclass(slots=True)
class Score:
    """What was found. hit_tokens, saved_seconds: for each tier; what loads take is subtracted.

    tokens: of all prompts. seconds: to compute them. blocks, hit_blocks: full ones.
    """

    hit_tokens: list[int]
    saved_seconds: list[float]
    tokens: int = 0
    seconds: float = 0.0
    blocks: int = 0
    hit_blocks: int = 0

    @property
    def token_hit_rate(self) -> float:
        """The share of prompts' tokens that were found."""
        return sum(self.hit_tokens) / self.tokens

    @property
    def byte_hit_rate(self) -> float:
        """The share of the bytes of full blocks that were found."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def saved(self) -> float:
        """The share of the seconds of computing that were saved."""
        return sum(self.saved_seconds) / self.seconds


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier that is replayed: its policy, and what it costs to use what it has."""

    policy: Policy[Any]
    load: Load = field(default_factory=Load)


def replay(found: Recording, tiers: Sequence[Tier], recompute: Recompute) -> Score:
    """Return what requests find in tiers, the fastest first, all empty before.

    What is given up by one tier goes to the next. A request uses blocks from the first on until one is nowhere; those
    of a slow tier that follow each other are loaded at once, or, where computing is faster, they and all behind them
    are computed. At least one token is computed. What was computed or loaded is then in the first tier.
    """
    score = Score([0] * len(tiers), [0.0] * len(tiers))
    stack = _Stack(tiers, found.block_size, found.block_bytes)
    for request in found.requests:
        score.tokens += request.tokens
        score.seconds += recompute.seconds(0, request.tokens)
        score.blocks += len(request.blocks)
        for tier, begin, end in _runs(found.usable(request), tiers):
            first, last = begin * found.block_size, end * found.block_size
            load, size = tiers[tier].load, (end - begin) * found.block_bytes
            if not worth_loading(recompute, load, first, last, size):
                break
            score.hit_blocks += end - begin
            score.hit_tokens[tier] += last - first
            score.saved_seconds[tier] += recompute.seconds(first, last) - load.seconds(size)
        stack.keep(request)
    return score


def _runs(blocks: Sequence[Hashable], tiers: Sequence[Tier]) -> list[tuple[int, int, int]]:
    """Return (tier, begin, end) of blocks [begin, end) that are in one tier, until one is in none."""
    runs: list[tuple[int, int, int]] = []
    for index, block in enumerate(blocks):
        tier = next((number for number, tier in enumerate(tiers) if block in tier.policy), None)
        if tier is None:
            break
        if runs and runs[-1][0] == tier:
            runs[-1] = (tier, runs[-1][1], index + 1)
        else:
            runs.append((tier, index, index + 1))
    return runs


class _Stack:
    """Tiers, of which each gives what it has no room for to the next."""

    def __init__(self, tiers: Sequence[Tier], block_size: int, block_bytes: int) -> None:
        self._policies = [tier.policy for tier in tiers]
        self._block_size, self._block_bytes = block_size, block_bytes
        # What a block follows on, how many are before it, whose it is.
        self._facts: dict[Hashable, tuple[Hashable | None, int, str]] = {}

    def keep(self, request: Asked) -> None:
        """Have all blocks of a request in the first tier, as far as there is room."""
        before: Hashable | None = None
        fits = True
        for index, block in enumerate(request.blocks):
            self._facts.setdefault(block, (before, index, request.tenant))
            for policy in self._policies:
                policy.touch(block, request.time)
            if fits and block not in self._policies[0]:
                fits = self._put(0, block, request.time)
            before = block

    def _put(self, tier: int, block: Hashable, now: float) -> bool:
        parent, index, tenant = self._facts[block]
        position = index * self._block_size
        fits, gone = self._policies[tier].insert(block, parent, self._block_bytes, position, now, tenant)
        for other in gone:
            if tier + 1 < len(self._policies) and other not in self._policies[tier + 1]:
                self._put(tier + 1, other, now)
        return fits
