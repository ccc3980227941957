"""What a soak showed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ktcompile.bench.serve.outcome import OK, Outcome
from ktcompile.bench.serve.soak import ORDINARY, SHARES, Soaked
from ktcompile.bench.serve.stats import Spread

SCHEMA = "ktc bench serve soak 1"
# A server that is full or has no time says so by these.
_ALLOWED_ERRORS = ("503", "504")


@dataclass(frozen=True, slots=True)
class Thirds:
    """The 99th percentile of a latency in the first third of a soak and in the last, in seconds."""

    first: float
    last: float

    @property
    def drift(self) -> float:
        """The last over the first."""
        return self.last / self.first if self.first else float("inf")


@dataclass(frozen=True, slots=True)
class SoakReport:
    """A soak of one server. capacity: requests per second that ended well in a closed loop, before;
    None: the rate was given."""

    machine: dict[str, Any]
    method: dict[str, Any]
    name: str
    model: str
    dialect: str
    capacity: float | None
    soaked: Soaked

    def statuses(self) -> dict[str, dict[str, int]]:
        """Return how many requests ended how, by kind."""
        kinds = (ORDINARY, *SHARES)
        return {k: dict(sorted(Counter(e.status for e in self.soaked.ends if e.kind == k).items())) for k in kinds}

    def refusals(self) -> tuple[int, int]:
        """Return how many ordinary requests had a 429, and how many of these said when to come again."""
        refused = [o for o in self.soaked.ordinary if o.status == "429"]
        return len(refused), sum(o.retry_after is not None for o in refused)

    def thirds(self) -> dict[str, Thirds]:
        """Return the time to the first token and between tokens, of ordinary requests that ended well."""
        good = [o for o in self.soaked.ordinary if o.status == OK]
        edge = self.soaked.seconds / 3
        first, last = [o for o in good if o.sent < edge], [o for o in good if o.sent >= 2 * edge]
        result = {}
        for name, of in (("ttft", _ttfts), ("itl", _gaps)):
            spreads = Spread.of(of(first)), Spread.of(of(last))
            if spreads[0] and spreads[1]:
                result[name] = Thirds(spreads[0].p99, spreads[1].p99)
        return result

    def memory(self) -> tuple[int, int, int] | None:
        """Return the median resident bytes of the first and of the last third, and the most; None if nobody looked."""
        samples = [(t, size) for t, size in self.soaked.memory if t <= self.soaked.seconds]
        third = len(samples) // 3
        if not third:
            return None
        sizes = [size for _, size in samples]
        return round(statistics.median(sizes[:third])), round(statistics.median(sizes[-third:])), max(sizes)

    def problems(self) -> list[str]:
        """Return what a server must not do, and did."""
        found = []
        if self.soaked.unended:
            found.append(f"{self.soaked.unended} requests were stuck: they had no end when all should have")
        for kind, statuses in self.statuses().items():
            for status, count in statuses.items():
                error = status.isdecimal() and status >= "500" and status not in _ALLOWED_ERRORS
                if error or status in ("timeout", "connection", "cut off", "stream"):
                    found.append(f"{count} requests ({kind}) ended by: {status}")
        accepted = self.statuses()["bad JSON"].get(OK, 0)
        if accepted:
            found.append(f"{accepted} requests that are none were answered")
        refused, polite = self.refusals()
        if polite < refused:
            found.append(f"{refused - polite} of {refused} refusals had no Retry-After")
        if not self.soaked.answers_after:
            found.append("it did not answer when all was over")
        for name, value in asdict(self.soaked.idle).items() if self.soaked.idle else ():
            if value:
                found.append(f"when all was over its {name} was {value:g}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the report with what follows from it."""
        refused, polite = self.refusals()
        return {
            "schema": SCHEMA,
            **asdict(self),
            "statuses": self.statuses(),
            "refusals": {"count": refused, "with_retry_after": polite},
            "p99_seconds": {k: {**asdict(t), "drift": t.drift} for k, t in self.thirds().items()},
            "memory_bytes": self.memory(),
            "problems": self.problems(),
        }


def _ttfts(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.ttft for o in outcomes]


def _gaps(outcomes: Sequence[Outcome]) -> list[float]:
    return [gap for o in outcomes for gap in o.gaps()]
