"""What a benchmark of a whole model measured, and what follows from it.

A turn is some calls of one contender, between two measurements of the machine's ceilings. Whatever is compared was
measured at (nearly) the same time: a turn with its own ceilings, a contender with another in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ktcompile.bench.model.contenders import ModelContender
from ktcompile.bench.model.demand import Demand, Work
from ktcompile.bench.report import paired_ratio
from ktcompile.bench.roofline import Ceilings

SCHEMA = "ktc bench model 1"


@dataclass(frozen=True, slots=True)
class Turn:
    """Some calls of a contender.

    round: turns of the same round are compared. seconds: median of the calls. bandwidth, flops: mean of the ceilings
    right before and right after; flops is that of its arithmetic.
    """

    contender: str
    work: Work
    round: int
    calls: int
    seconds: float
    min_seconds: float
    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Start:
    """How a contender began, and what it takes.

    load_seconds: until the model could be called, without the imports of its libraries. resident_bytes: of the process
    then, files that it maps included. first_seconds: the first turn of each piece of work, which may compile, by the
    work's name. peak_bytes: the most of the process so far; both None where the system does not tell.
    """

    load_seconds: float
    resident_bytes: int | None
    versions: dict[str, str]
    first_seconds: dict[str, float]
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one piece of work.

    seconds: of a call, median over the rounds. bytes, flops: of a call, at least. fraction: of the roofline, the median
    over the rounds of each turn against its own ceilings. of_best: the median time against the best ceilings of the
    whole run. ratios, for ktcompile: how many times longer another takes, the median over the rounds of both.
    """

    contender: str
    work: Work
    rounds: int
    seconds: float
    min_seconds: float
    bytes: float
    flops: float
    fraction: float
    of_best: float
    ratios: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.work.size / self.seconds


@dataclass(frozen=True, slots=True)
class ModelReport:
    """machine, method: what it ran on, and how. model: its name and sizes. demands: what each piece of work takes, by
    contender and name of the work. agreement: the share of tokens that a contender chose as the first one did.
    logit_errors: how far its logits are from those of the first, relative to the norm of these.
    skipped: why contenders were left out, or what they could not do. best: None if nothing was measured."""

    machine: dict[str, Any]
    method: dict[str, Any]
    model: dict[str, Any]
    interrupted: bool
    contenders: tuple[ModelContender, ...]
    demands: dict[str, dict[str, Demand]]
    starts: dict[str, Start]
    agreement: dict[str, float]
    skipped: dict[str, str]
    best: Ceilings | None
    turns: tuple[Turn, ...]
    logit_errors: dict[str, float] = field(default_factory=dict)

    @property
    def results(self) -> tuple[Result, ...]:
        """Return a result for each piece of work and contender that has turns."""
        works = dict.fromkeys(turn.work for turn in self.turns)
        found = (self._result(contender, work) for work in works for contender in self.contenders)
        return tuple(result for result in found if result is not None)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, with the results beside the turns that they follow from."""
        record = {"schema": SCHEMA, **asdict(self)}
        record["results"] = [{**asdict(r), "tokens_per_second": r.tokens_per_second} for r in self.results]
        return record

    @classmethod
    def from_json(cls, record: Any) -> ModelReport:
        """Return the report that `to_json` wrote. ValueError: it is something else."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError("it is not a result of 'ktc bench model --json'")
        fields = {name: value for name, value in record.items() if name not in ("schema", "results")}
        try:
            best = fields["best"]
            fields |= {
                "contenders": tuple(ModelContender(**c) for c in fields["contenders"]),
                "demands": {c: {w: Demand(**d) for w, d in own.items()} for c, own in fields["demands"].items()},
                "starts": {name: Start(**start) for name, start in fields["starts"].items()},
                "best": None if best is None else Ceilings(**best),
                "turns": tuple(Turn(**{**turn, "work": Work(**turn["work"])}) for turn in fields["turns"]),
            }
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a part is missing or unknown: {error}") from error

    def _result(self, contender: ModelContender, work: Work) -> Result | None:
        own = self._rounds(contender, work)
        if not own or self.best is None:
            return None
        needed = self.demands[contender.name][str(work)]
        seconds = statistics.median(turn.seconds for turn in own.values())
        others = [other for other in self.contenders if contender.ours and other is not contender]
        ratios = {o.name: paired_ratio(_seconds(self._rounds(o, work)), _seconds(own)) for o in others}
        return Result(
            contender=contender.name,
            work=work,
            rounds=len(own),
            seconds=seconds,
            min_seconds=min(turn.min_seconds for turn in own.values()),
            bytes=needed.bytes,
            flops=needed.flops,
            fraction=statistics.median(needed.seconds(t.bandwidth, t.flops) / t.seconds for t in own.values()),
            of_best=needed.seconds(self.best.bandwidth, self.best.flops[contender.arithmetic]) / seconds,
            ratios={name: ratio for name, ratio in ratios.items() if ratio is not None},
        )

    def _rounds(self, contender: ModelContender, work: Work) -> dict[int, Turn]:
        return {t.round: t for t in self.turns if t.contender == contender.name and t.work == work}


def agreement(chosen: dict[str, dict[str, Sequence[int]]], contenders: Sequence[str]) -> dict[str, float]:
    """Return the share of tokens that each contender chose as the first did after the same prompts.

    chosen: by contender and turn. It tells a model that was loaded wrongly from one that rounds otherwise.
    """
    shares = {}
    for name in contenders[1:]:
        first, own = chosen.get(contenders[0], {}), chosen.get(name, {})
        pairs = [pair for turn in first.keys() & own.keys() for pair in zip(first[turn], own[turn], strict=True)]
        if pairs:
            shares[name] = sum(a == b for a, b in pairs) / len(pairs)
    return shares


def _seconds(turns: dict[int, Turn]) -> dict[int, float]:
    return {number: turn.seconds for number, turn in turns.items()}
