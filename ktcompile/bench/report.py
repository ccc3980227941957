"""What a benchmark of kernels measured, and what follows from it.

A turn is some calls of one contender, between two measurements of the machine's ceilings. Whatever is compared was
measured at (nearly) the same time: a turn with its own ceilings, a contender with a peer in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ktcompile.bench.contenders import Contender
from ktcompile.bench.roofline import Ceilings
from ktcompile.bench.shapes import MoeShape

SCHEMA = "ktc bench kernels 1"
_ACTIVATION_BYTES = 4  # of an element that is read and of one that is written, bf16


@dataclass(frozen=True, slots=True)
class Turn:
    """Some calls of a contender.

    round: turns of the same round are compared. seconds: median of the calls. distinct_experts: mean of the calls.
    bandwidth, flops: mean of the ceilings right before and right after; flops is that of its arithmetic.
    """

    contender: str
    tokens: int
    round: int
    calls: int
    seconds: float
    min_seconds: float
    distinct_experts: float
    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one token count.

    seconds: median over the rounds. bytes, flops: of a call. fraction: of the roofline, the median over the rounds
    of each turn against its own ceilings. of_best: the median time against the best ceilings of the whole run;
    min_of_best: the shortest time against them. ratios, for ktcompile: how many times longer a peer takes, the median
    over the rounds that both have.
    """

    contender: str
    tokens: int
    rounds: int
    seconds: float
    min_seconds: float
    bytes: float
    flops: float
    fraction: float
    of_best: float
    min_of_best: float
    ratios: dict[str, float]

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """All about one shape. notes: what the reader should know. skipped: why contenders were left out or ended.
    best: the best ceilings while it ran; None if nothing was measured."""

    name: str
    shape: MoeShape
    contenders: tuple[Contender, ...]
    notes: tuple[str, ...]
    skipped: dict[str, str]
    best: Ceilings | None
    turns: tuple[Turn, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        if self.best is None:
            return ()
        return summarise(self.shape, self.contenders, self.turns, self.best)


@dataclass(frozen=True, slots=True)
class KernelsReport:
    """machine: what it ran on, and with which versions. method: how it was measured."""

    machine: dict[str, Any]
    method: dict[str, Any]
    interrupted: bool
    shapes: tuple[ShapeReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, with the results beside the turns that they follow from."""
        record = {"schema": SCHEMA, **asdict(self)}
        for shape, written in zip(self.shapes, record["shapes"], strict=True):
            written["results"] = [
                {**asdict(r), "bytes_per_second": r.bytes_per_second, "flops_per_second": r.flops_per_second}
                for r in shape.results
            ]
        return record

    @classmethod
    def from_json(cls, record: Any) -> KernelsReport:
        """Return the report that `to_json` wrote. ValueError: it is something else."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError("it is not a result of 'ktc bench kernels --out'")
        try:
            shapes = tuple(_shape_report(s) for s in record["shapes"])
            return cls(record["machine"], record["method"], record["interrupted"], shapes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a part is missing or unknown: {error}") from error


def summarise(
    shape: MoeShape, contenders: Iterable[Contender], turns: Sequence[Turn], best: Ceilings
) -> tuple[Result, ...]:
    """Return a result for each contender and token count that has turns, by token count."""
    order = list(contenders)
    results = []
    for tokens in sorted({t.tokens for t in turns}):
        rounds = {c.name: {t.round: t for t in turns if (t.contender, t.tokens) == (c.name, tokens)} for c in order}
        for contender in order:
            own = rounds[contender.name]
            if not own:
                continue
            peers = {c.name: rounds[c.name] for c in order if contender.ours and not c.ours}
            results.append(_result(shape, contender, tokens, own, peers, best))
    return tuple(results)


def call_bytes(shape: MoeShape, contender: Contender, tokens: int, distinct_experts: float) -> float:
    """Return what a call must read and write: the experts that it touches, its input and its output."""
    activations = tokens * shape.hidden_size * _ACTIVATION_BYTES
    return shape.bytes(distinct_experts, contender.bytes_per_weight) + activations


def _result(
    shape: MoeShape,
    contender: Contender,
    tokens: int,
    own: dict[int, Turn],
    peers: dict[str, dict[int, Turn]],
    best: Ceilings,
) -> Result:
    flops = shape.flops(tokens)

    def bound(turn: Turn, bandwidth: float, peak: float) -> float:
        return max(call_bytes(shape, contender, tokens, turn.distinct_experts) / bandwidth, flops / peak)

    seconds = statistics.median(t.seconds for t in own.values())
    peak = best.flops[contender.arithmetic]
    least = statistics.mean(bound(t, best.bandwidth, peak) for t in own.values())
    min_seconds = min(t.min_seconds for t in own.values())
    return Result(
        contender=contender.name,
        tokens=tokens,
        rounds=len(own),
        seconds=seconds,
        min_seconds=min_seconds,
        bytes=statistics.mean(call_bytes(shape, contender, tokens, t.distinct_experts) for t in own.values()),
        flops=flops,
        fraction=statistics.median(bound(t, t.bandwidth, t.flops) / t.seconds for t in own.values()),
        of_best=least / seconds,
        min_of_best=least / min_seconds,
        ratios={n: ratio for n, turns in peers.items() if (ratio := paired_ratio(_seconds(turns), _seconds(own)))},
    )


def paired_ratio(slower: Mapping[int, float], faster: Mapping[int, float]) -> float | None:
    """Return how many times as long one takes as the other: of seconds by round, the median over those of both."""
    both = slower.keys() & faster.keys()
    return statistics.median(slower[r] / faster[r] for r in both) if both else None


def _seconds(turns: dict[int, Turn]) -> dict[int, float]:
    return {number: turn.seconds for number, turn in turns.items()}


def _shape_report(record: dict[str, Any]) -> ShapeReport:
    best = record["best"]
    return ShapeReport(
        name=record["name"],
        shape=MoeShape(**record["shape"]),
        contenders=tuple(Contender(**c) for c in record["contenders"]),
        notes=tuple(record["notes"]),
        skipped=record["skipped"],
        best=None if best is None else Ceilings(**best),
        turns=tuple(Turn(**t) for t in record["turns"]),
    )
