"""What a benchmark of engines with prefix caches measured, and what follows from it.

All engines get the same prompts in the same order, one after the other. Whatever is compared is of prompts that both
have answered, and was measured at (nearly) the same time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ktcompile.bench.prefix.contenders import EngineContender
from ktcompile.bench.report import paired_ratio
from ktcompile.bench.serve.stats import Spread

SCHEMA = "ktc bench cache engines 1"
TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Trace:
    """requests, tokens: of all prompts. shared_tokens: those of full blocks that an earlier prompt began with too."""

    name: str
    requests: int
    tokens: int
    shared_tokens: int


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine began. kv_tokens: for which it has room in memory, without a host's."""

    load_seconds: float
    kv_tokens: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Served:
    """One prompt at one engine. index: of the prompt in its trace. tokens: of the prompt. Others as of
    `process.Answer`."""

    contender: str
    trace: str
    index: int
    tokens: int
    seconds: float
    wall_seconds: float
    cpu_seconds: float
    token: int
    cached: dict[str, int]


@dataclass(frozen=True, slots=True)
class Ratios:
    """An engine over the first one, on the prompts of both: sums of the seconds to first tokens, the median of the
    prompts' own ratios, and sums of the seconds of all cores. same_tokens: the share of equal first tokens."""

    prefill: float
    paired: float
    cpu: float
    same_tokens: float


@dataclass(frozen=True, slots=True)
class Result:
    """One engine on one trace.

    prefill_seconds: to the first token, of all prompts together; wall_seconds until nothing was left to do, and
    cpu_seconds of all cores. cached: tokens that were found by tier. ttft: of a prompt. ratios: None for the first.
    """

    contender: str
    trace: str
    requests: int
    tokens: int
    prefill_seconds: float
    wall_seconds: float
    cpu_seconds: float
    cached: dict[str, int]
    ttft: Spread
    ratios: Ratios | None

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that were found."""
        return sum(self.cached.values()) / self.tokens


@dataclass(frozen=True, slots=True)
class EnginesReport:
    """machine, method: what it ran on, and how. model: its name. skipped: why engines were left out, or ended."""

    machine: dict[str, Any]
    method: dict[str, Any]
    model: str
    interrupted: bool
    contenders: tuple[EngineContender, ...]
    starts: dict[str, Start]
    skipped: dict[str, str]
    traces: tuple[Trace, ...]
    served: tuple[Served, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """Return a result for each trace and engine that answered prompts of it."""
        found = []
        for trace in self.traces:
            first = self._of(self.contenders[0], trace)
            for contender in self.contenders:
                own = self._of(contender, trace)
                if own:
                    ratios = None if contender == self.contenders[0] else _ratios(own, first)
                    found.append(_result(contender.name, trace.name, own.values(), ratios))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, with the results beside what they follow from."""
        record = {"schema": SCHEMA, **asdict(self)}
        record["results"] = [{**asdict(r), "hit_rate": r.hit_rate} for r in self.results]
        return record

    @classmethod
    def from_json(cls, record: Any) -> EnginesReport:
        """Return the report that `to_json` wrote. ValueError: it is something else."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError("it is not a result of 'ktc bench cache --engines'")
        fields = {name: value for name, value in record.items() if name not in ("schema", "results")}
        try:
            fields |= {
                "contenders": tuple(EngineContender(**c) for c in fields["contenders"]),
                "starts": {name: Start(**start) for name, start in fields["starts"].items()},
                "traces": tuple(Trace(**t) for t in fields["traces"]),
                "served": tuple(Served(**s) for s in fields["served"]),
            }
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a part is missing or unknown: {error}") from error

    def _of(self, contender: EngineContender, trace: Trace) -> dict[int, Served]:
        return {s.index: s for s in self.served if (s.contender, s.trace) == (contender.name, trace.name)}


def _result(contender: str, trace: str, served: Iterable[Served], ratios: Ratios | None) -> Result:
    own = list(served)
    ttft = Spread.of([s.seconds for s in own])
    assert ttft is not None
    return Result(
        contender=contender,
        trace=trace,
        requests=len(own),
        tokens=sum(s.tokens for s in own),
        prefill_seconds=sum(s.seconds for s in own),
        wall_seconds=sum(s.wall_seconds for s in own),
        cpu_seconds=sum(s.cpu_seconds for s in own),
        cached={tier: sum(s.cached.get(tier, 0) for s in own) for tier in TIERS},
        ttft=ttft,
        ratios=ratios,
    )


def _ratios(own: dict[int, Served], first: dict[int, Served]) -> Ratios | None:
    both = sorted(own.keys() & first.keys())
    paired = paired_ratio({i: own[i].seconds for i in both}, {i: first[i].seconds for i in both})
    if paired is None:
        return None

    def over(value: Callable[[Served], float]) -> float:
        return sum(value(own[i]) for i in both) / sum(value(first[i]) for i in both)

    same = statistics.fmean(own[i].token == first[i].token for i in both)
    return Ratios(over(lambda s: s.seconds), paired, over(lambda s: s.cpu_seconds), same)
