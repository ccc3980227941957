"""Puts servers under the same load, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ktcompile.bench.listener import Listener
from ktcompile.bench.serve import load, probe
from ktcompile.bench.serve import soak as soaking
from ktcompile.bench.serve.arrivals import ClosedLoop, OpenLoop
from ktcompile.bench.serve.dialect import Api
from ktcompile.bench.serve.outcome import OK, Outcome
from ktcompile.bench.serve.probe import Target
from ktcompile.bench.serve.report import ServeReport, ServerRun
from ktcompile.bench.serve.servers import Server, ServerError
from ktcompile.bench.serve.soak_report import SoakReport
from ktcompile.bench.serve.stats import summarise
from ktcompile.bench.serve.workload import Request, Workload

# So that requests of the warm-up have no prompt of the run.
_WARM_UP_INDEX = 1 << 20
# How many times the capacity a soak sends.
_OVERLOAD = 2.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be measured: one that runs at `url`, or one that is started. model_name: None is the first it has."""

    name: str
    url: str | None = None
    model_name: str | None = None
    kind: str | None = None
    python: str = ""
    model: Path | None = None


@dataclass(frozen=True, slots=True)
class ServeBenchmark:
    """What to run.

    warm_up: requests before those that count. timeout: seconds of a request. patience: seconds until a server answers.
    slo: objectives in seconds. extra: fields of each request.
    """

    contenders: tuple[Contender, ...]
    workload: Workload
    api: Api
    warm_up: int
    timeout: float
    patience: float
    threads: int
    slo: Mapping[str, float]
    api_key: str | None
    extra: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise ValueError(f"--warm-up of {self.warm_up} cannot be; it must be 0 or more")
        for name, value in (("--timeout", self.timeout), ("--patience", self.patience)):
            if not value > 0:
                raise ValueError(f"{name} of {value:g} cannot be; it must be positive")

    @property
    def turns(self) -> int:
        """Requests in all, those that do not count included."""
        return len(self.contenders) * (self.warm_up + len(self.workload.requests))

    def method(self) -> dict[str, Any]:
        """Return what a reader of the results has to know."""
        w = self.workload
        return {
            "requests": len(w.requests),
            "arrivals": str(w.arrivals),
            "lengths": w.what,
            "seed": w.seed,
            "warm_up": self.warm_up,
            "timeout_seconds": self.timeout,
            "prompts": "the same for all servers, greedy answers",
        }


def run(
    benchmark: ServeBenchmark,
    machine: dict[str, Any],
    listener: Listener,
    start: Callable[[Contender, int], Server],
) -> ServeReport:
    """Return what was measured, up to Ctrl-C if that comes. machine: for the report. start: starts a contender's
    server.

    ValueError: a server that runs already is not there, or cannot be used.
    """
    runs: list[ServerRun] = []
    skipped: dict[str, str] = {}

    def report(interrupted: bool = False) -> ServeReport:
        wanted = tuple(r.output_tokens for r in benchmark.workload.requests)
        return ServeReport(
            machine, benchmark.method(), interrupted, wanted, dict(benchmark.slo), tuple(runs), dict(skipped)
        )

    for contender in benchmark.contenders:
        outcomes: list[Outcome] = []
        try:
            with serving(contender, benchmark, listener, start) as found:
                begun = _Begun(contender, found)
                try:
                    _measure(benchmark, begun, listener, outcomes)
                finally:
                    if outcomes:
                        runs.append(begun.result(outcomes))
        except ServerError as error:
            skipped[contender.name] = str(error)
            listener.advance(benchmark.warm_up + len(benchmark.workload.requests) - len(outcomes))
        except KeyboardInterrupt:
            return report(interrupted=True)
        listener.save(report())
    return report()


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answers. server: None if it ran already."""

    target: Target
    server: Server | None
    start_seconds: float | None


@contextmanager
def serving(
    contender: Contender, benchmark: ServeBenchmark, listener: Listener, start: Callable[[Contender, int], Server]
) -> Iterator[Found]:
    """Give a contender's server, started if need be, and end it afterwards.

    ServerError: one that was started cannot be used. ValueError: one that ran already cannot.
    """

    def find(url: str, name: str | None, must_list: bool) -> Target:
        return asyncio.run(
            probe.find(
                url,
                name,
                benchmark.api,
                benchmark.workload,
                api_key=benchmark.api_key,
                extra=benchmark.extra,
                timeout=benchmark.patience,
                must_list=must_list,
            )
        )

    if contender.url is not None:
        listener.note(f"{contender.name}: asking what it is")
        yield Found(find(contender.url, contender.model_name, must_list=True), None, None)
        return
    listener.note(f"{contender.name}: starting")
    server = start(contender, benchmark.threads)
    try:
        seconds = server.wait(benchmark.patience)
        try:
            target = find(server.url, contender.model_name, must_list=False)
        except ValueError as error:
            raise ServerError(str(error)) from error
        yield Found(target, server, seconds)
    finally:
        server.close()


class _Begun:
    """A server before its load, and what becomes of it."""

    def __init__(self, contender: Contender, found: Found) -> None:
        self.name, self.target, self.server = contender.name, found.target, found.server
        self._start_seconds = found.start_seconds
        self._idle_bytes = None if found.server is None else found.server.resident_bytes()

    def result(self, outcomes: list[Outcome]) -> ServerRun:
        t = self.target
        return ServerRun(
            name=self.name,
            url=t.url,
            model=t.model,
            dialect=str(t.dialect),
            start_seconds=self._start_seconds,
            idle_bytes=self._idle_bytes,
            loaded_bytes=None if self.server is None else self.server.resident_bytes(),
            outcomes=tuple(sorted(outcomes, key=lambda o: o.index)),
        )


def soak(
    benchmark: ServeBenchmark,
    seconds: float,
    machine: dict[str, Any],
    listener: Listener,
    start: Callable[[Contender, int], Server],
) -> SoakReport:
    """Send a server too much for some seconds, and return what came of it: as many requests as the workload's open loop
    says, or twice of what it is found to do in its closed loop.

    ValueError: it cannot be used, or no request ended well.
    """
    (contender,) = benchmark.contenders
    outcomes: list[Outcome] = []
    try:
        with serving(contender, benchmark, listener, start) as found:
            capacity, arrivals = None, benchmark.workload.arrivals
            if isinstance(arrivals, OpenLoop):
                rate = arrivals.rate
            else:
                capacity = _capacity(benchmark, _Begun(contender, found), listener, outcomes)
                rate = _OVERLOAD * capacity
            soaked = asyncio.run(
                soaking.soak(
                    found.target,
                    benchmark.workload,
                    rate=rate,
                    seconds=seconds,
                    timeout=benchmark.timeout,
                    api_key=benchmark.api_key,
                    resident_bytes=None if found.server is None else found.server.resident_bytes,
                    told=lambda text: listener.note(f"{contender.name}: {text}"),
                )
            )
    except ServerError as error:
        raise ValueError(f"{contender.name}: {error}") from error
    t = found.target
    return SoakReport(machine, benchmark.method(), contender.name, t.model, str(t.dialect), capacity, soaked)


def _capacity(benchmark: ServeBenchmark, begun: _Begun, listener: Listener, outcomes: list[Outcome]) -> float:
    """Return the requests per second that end well in a closed loop. ValueError: none does."""
    _measure(benchmark, begun, listener, outcomes)
    capacity = summarise(outcomes, {r.index: r.output_tokens for r in benchmark.workload.requests}, {}).request_rate
    if not capacity:
        raise ValueError(f"no request to {begun.name} ended well: {outcomes[0].status} {outcomes[0].detail}")
    return capacity


def _measure(benchmark: ServeBenchmark, begun: _Begun, listener: Listener, outcomes: list[Outcome]) -> None:
    def advance(outcome: Outcome) -> None:
        listener.advance(1)

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        listener.advance(1)
        bad = sum(o.status != OK for o in outcomes)
        failed = f", {bad} failed" if bad else ""
        listener.note(f"{begun.name}: {len(outcomes)} of {len(benchmark.workload.requests)} requests{failed}")

    listener.note(f"{begun.name}: warming up")
    for workload, told in ((_warm_up(benchmark), advance), (benchmark.workload, keep)):
        if workload.requests:
            t = begun.target
            asyncio.run(
                load.run(
                    t.url, t.model, t.dialect, workload, api_key=benchmark.api_key, timeout=benchmark.timeout, keep=told
                )
            )
        if begun.server is not None and not begun.server.alive:
            raise ServerError("it ended under the load")


def _warm_up(benchmark: ServeBenchmark) -> Workload:
    """Return requests of the same lengths with other prompts, in a closed loop."""
    w = benchmark.workload
    arrivals = w.arrivals if isinstance(w.arrivals, ClosedLoop) else ClosedLoop(max(1, min(4, benchmark.warm_up)))
    chosen = [w.requests[i % len(w.requests)] for i in range(benchmark.warm_up)]
    requests = tuple(_other(r, _WARM_UP_INDEX + i) for i, r in enumerate(chosen))
    return replace(w, requests=requests, arrivals=arrivals)


def _other(request: Request, index: int) -> Request:
    return replace(request, index=index, arrival=None, blocks=())
