"""Policies side by side, on recordings and capacities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ktcompile.bench.cache.belady import most_hits
from ktcompile.bench.cache.replay import Tier, replay
from ktcompile.bench.cache.traces import footprint
from ktcompile.cache import policies
from ktcompile.cache.costs import Load, Recompute, Worth
from ktcompile.cache.policy import Limits
from ktcompile.cache.recording import Recording

TIERS = ("device", "host", "disk")
BELADY = "belady"


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine takes: to compute prompts, and to load from each of `TIERS`; what `Worth` says of weight."""

    recompute: Recompute
    loads: tuple[Load, Load, Load]
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy found. share: capacity over the bytes of all distinct blocks, for one tier or one for each.

    token_hit_rate, byte_hit_rate: shares of all tokens, and of the bytes of full blocks. saved: share of the seconds of
    computing, less those of loading. of_belady: token_hit_rate over the highest that there is; None: nothing can be
    found. by_tier: share of all tokens that each tier gave.
    """

    trace: str
    share: tuple[float, ...]
    policy: str
    token_hit_rate: float
    byte_hit_rate: float | None = None
    saved: float | None = None
    of_belady: float | None = None
    by_tier: tuple[float, ...] = ()


def compare(
    traces: dict[str, Recording],
    names: Sequence[str],
    shares: Sequence[tuple[float, ...]],
    rates: Rates,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Result]:
    """Return what policies find on each trace at each capacity, after what the best one would that knows the future.

    shares: of the bytes of all distinct blocks: one number, a tier of the device, or one for each of `TIERS`. Tiers
    together are compared with one of their sum.
    """
    results: list[Result] = []
    for number, (trace, found) in enumerate(traces.items()):
        for part, share in enumerate(shares):
            results += _at(trace, found, names, share, rates)
            progress((number + (part + 1) / len(shares)) / len(traces))
    return results


def _at(trace: str, found: Recording, names: Sequence[str], share: tuple[float, ...], rates: Rates) -> Iterator[Result]:
    whole = footprint(found)
    capacities = [max(found.block_bytes, round(whole * part)) for part in share]
    tokens = sum(request.tokens for request in found.requests)
    most = most_hits(found, sum(capacities))
    yield Result(trace, share, BELADY, most / tokens, of_belady=1.0 if most else None)
    for name in names:
        tiers = [_tier(name, size, found, rates, load) for size, load in zip(capacities, rates.loads, strict=False)]
        score = replay(found, tiers, rates.recompute)
        of_belady = sum(score.hit_tokens) / most if most else None
        by_tier = tuple(hits / tokens for hits in score.hit_tokens)
        yield Result(trace, share, name, score.token_hit_rate, score.byte_hit_rate, score.saved, of_belady, by_tier)


def _tier(name: str, capacity: int, found: Recording, rates: Rates, load: Load) -> Tier:
    worth = Worth(rates.recompute, load, found.block_size, rates.weight)
    return Tier(policies.make(name, Limits(capacity), worth), load)
