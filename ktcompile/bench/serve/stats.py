"""What outcomes say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ktcompile.bench.serve import slo as objectives
from ktcompile.bench.serve.outcome import OK, Outcome

_PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Times in seconds: percentiles with linear interpolation, and the mean."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread; None where there are no values."""
        if not values:
            return None
        p50, p90, p99 = (float(v) for v in np.percentile(values, _PERCENTS))
        return cls(len(values), float(np.mean(values)), p50, p90, p99, float(max(values)))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run. Latencies are those of requests that ended well.

    seconds: from the first request's start until the last request's end. statuses: how many requests ended how. short:
    those that ended well with fewer tokens than asked for. output_rate, request_rate: tokens and requests that ended
    well per second. goodput: requests within all objectives per second; None without objectives. late: how much later
    than planned requests were sent.
    """

    seconds: float
    statuses: dict[str, int]
    short: int
    input_tokens: int
    output_tokens: int
    output_rate: float
    request_rate: float
    goodput: float | None
    met: int | None
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    late: Spread | None


def summarise(outcomes: Sequence[Outcome], wanted: Mapping[int, int], slo: Mapping[str, float]) -> Summary:
    """Return what outcomes say. wanted: tokens that a request asked for, by index. slo: objectives in seconds."""
    good = [o for o in outcomes if o.status == OK]
    begin = min((o.sent for o in outcomes), default=0.0)
    seconds = max((o.end for o in outcomes), default=0.0) - begin
    met = sum(objectives.met(o, slo) for o in good) if slo else None
    tokens = sum(o.tokens for o in good)

    def rate(count: float) -> float:
        return count / seconds if seconds > 0 else 0.0

    return Summary(
        seconds=seconds,
        statuses=dict(sorted(Counter(o.status for o in outcomes).items())),
        short=sum(o.tokens < wanted[o.index] for o in good),
        input_tokens=sum(o.prompt_tokens or 0 for o in good),
        output_tokens=tokens,
        output_rate=rate(tokens),
        request_rate=rate(len(good)),
        goodput=None if met is None else rate(met),
        met=met,
        ttft=Spread.of([o.ttft for o in good]),
        itl=Spread.of([gap for o in good for gap in o.gaps()]),
        tpot=Spread.of(_known(o.tpot for o in good)),
        e2e=Spread.of([o.e2e for o in good]),
        late=Spread.of([o.late for o in outcomes]),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]
