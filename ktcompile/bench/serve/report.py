"""What a benchmark of servers measured, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ktcompile.bench.serve.outcome import Outcome
from ktcompile.bench.serve.stats import Summary, summarise

SCHEMA = "ktc bench serve 1"
# Of times in a file: ten microseconds, far below what a client can measure.
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One server under the load.

    url: where it was. model: its name there. dialect: how requests were written. start_seconds: until it answered;
    None if it ran already. idle_bytes, loaded_bytes: memory of its processes before and after the load; None if it is
    not ours to look at.
    """

    name: str
    url: str
    model: str
    dialect: str
    start_seconds: float | None
    idle_bytes: int | None
    loaded_bytes: int | None
    outcomes: tuple[Outcome, ...]

    @property
    def counting(self) -> str:
        """How tokens were counted, by most requests."""
        found = [o.counting for o in self.outcomes if o.chunks]
        return max(set(found), key=found.count) if found else "nothing"


@dataclass(frozen=True, slots=True)
class ServeReport:
    """machine, method: what a reader has to know. wanted: tokens that each request asked for. slo: objectives in
    seconds. skipped: why servers are left out."""

    machine: dict[str, Any]
    method: dict[str, Any]
    interrupted: bool
    wanted: tuple[int, ...]
    slo: dict[str, float]
    runs: tuple[ServerRun, ...]
    skipped: dict[str, str]

    def summary(self, run: ServerRun) -> Summary:
        """Return what a run's outcomes say."""
        return summarise(run.outcomes, dict(enumerate(self.wanted)), self.slo)

    def to_json(self) -> dict[str, Any]:
        """Return the report with its summaries, which `from_json` leaves out since they follow."""
        record = {"schema": SCHEMA, **asdict(self)}
        for own, run in zip(record["runs"], self.runs, strict=True):
            own["outcomes"] = [_rounded(asdict(o)) for o in run.outcomes]
            own["summary"] = asdict(self.summary(run))
        return record

    @classmethod
    def from_json(cls, record: Any) -> ServeReport:
        """Return the report that `to_json` wrote. ValueError: it is something else."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError("it is not a result of 'ktc bench serve --json'")
        fields = {name: value for name, value in record.items() if name != "schema"}
        try:
            fields["wanted"] = tuple(fields["wanted"])
            fields["runs"] = tuple(_run(run) for run in fields["runs"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a part is missing or unknown: {error}") from error


def _rounded(outcome: dict[str, Any]) -> dict[str, Any]:
    times = {name: round(outcome[name], _DIGITS) for name in ("sent", "late", "end")}
    return outcome | times | {"chunks": [[round(time, _DIGITS), count] for time, count in outcome["chunks"]]}


def _run(record: dict[str, Any]) -> ServerRun:
    fields = {name: value for name, value in record.items() if name != "summary"}
    outcomes = tuple(Outcome(**{**o, "chunks": tuple((t, n) for t, n in o["chunks"])}) for o in fields["outcomes"])
    return ServerRun(**{**fields, "outcomes": outcomes})
