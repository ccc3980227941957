"""A whole model by contender, batch of decode and length of prompt, beside the machine's ceilings.

The memory bandwidth of a shared machine moves by half within seconds. So the ceilings are measured again before and
after each turn of each contender, and contenders take turns: what is compared was measured at nearly the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ktcompile.bench.listener import Listener
from ktcompile.bench.model.contenders import ModelContender
from ktcompile.bench.model.demand import CONTEXT, Demand, Work, demand
from ktcompile.bench.model.process import Loaded, ModelProcess, Settings
from ktcompile.bench.model.report import ModelReport, Start, Turn, agreement
from ktcompile.bench.process import ContenderError
from ktcompile.bench.roofline import Ceilings, Probe, probe_bytes
from ktcompile.plan.architecture import Architecture

_FIRST_STEPS = 2


@dataclass(frozen=True, slots=True)
class ModelBenchmark:
    """What to run.

    groups: the contenders that are in memory at once, the first of all in each. skipped: why others are left out.
    rounds: turns of each contender in a group, at each piece of work. once_above: seconds of a call above which a
    contender has one round there.
    """

    model: Architecture
    settings: Settings
    groups: tuple[tuple[ModelContender, ...], ...]
    skipped: dict[str, str]
    rounds: int
    once_above: float

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"--rounds of {self.rounds} cannot be; it must be 1 or more")

    @property
    def contenders(self) -> tuple[ModelContender, ...]:
        return tuple(dict.fromkeys(c for group in self.groups for c in group))

    @property
    def turns(self) -> int:
        """Turns in all, the first ones that do not count included, if no contender drops out."""
        of_rounds = self.rounds * sum(map(len, self.groups))
        return len(self.settings.works) * (len(self.contenders) + of_rounds)

    def method(self) -> dict[str, Any]:
        """Return what a reader of the results has to know."""
        s = self.settings
        return {
            "rounds": self.rounds,
            "steps": s.steps,
            "context": CONTEXT,
            "cache": s.cache,
            "once_above_seconds": self.once_above,
            "groups": [[c.name for c in group] for group in self.groups],
            "probe_bytes": probe_bytes(),
            "prompts": "random tokens, others in each round, the same for all contenders",
        }


def run(
    benchmark: ModelBenchmark,
    machine: dict[str, Any],
    listener: Listener,
    start: Callable[[ModelContender, Settings], ModelProcess] = ModelProcess,
    make_probe: Callable[[int, Sequence[str]], Probe] = Probe,
) -> ModelReport:
    """Return what was measured, up to Ctrl-C if that comes. machine: for the report.

    start, make_probe: what runs contenders and what measures the ceilings.
    """
    state = _Run(benchmark, machine, listener, start)
    try:
        state.measure(make_probe)
    except KeyboardInterrupt:
        return replace(state.report(), interrupted=True)
    finally:
        state.close()
    return state.report()


class _Run:
    """What has been measured so far, and the processes that are in memory."""

    def __init__(
        self,
        benchmark: ModelBenchmark,
        machine: dict[str, Any],
        listener: Listener,
        start: Callable[[ModelContender, Settings], ModelProcess],
    ) -> None:
        self._benchmark, self._machine, self._listener, self._start = benchmark, machine, listener, start
        self._processes: dict[str, ModelProcess] = {}
        self._contenders: dict[str, ModelContender] = {}
        self._demands: dict[str, dict[str, Demand]] = {}
        self._starts: dict[str, Start] = {}
        self._skipped = dict(benchmark.skipped)
        self._failed: set[tuple[str, Work]] = set()
        self._long: set[tuple[str, Work]] = set()  # and no longer asked for by this group
        self._chosen: dict[str, dict[str, Sequence[int]]] = {}
        self._logits: np.ndarray | None = None  # of the first contender
        self._errors: dict[str, float] = {}
        self._best: Ceilings | None = None
        self._turns: list[Turn] = []

    def report(self) -> ModelReport:
        """Return what there is so far."""
        names = [c.name for c in self._benchmark.contenders if c.name in self._starts]
        return ModelReport(
            machine=self._machine,
            method=self._benchmark.method(),
            model={k: v for k, v in asdict(self._benchmark.model).items() if k not in ("experts", "cache")},
            interrupted=False,
            contenders=tuple(self._contenders[name] for name in names),
            demands=self._demands,
            starts=dict(self._starts),
            agreement=agreement(self._chosen, names),
            skipped=dict(self._skipped),
            best=self._best,
            turns=tuple(self._turns),
            logit_errors=dict(self._errors),
        )

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def measure(self, make_probe: Callable[[int, Sequence[str]], Probe]) -> None:
        b = self._benchmark
        arithmetics = [c.arithmetic for c in b.contenders]
        self._probe = make_probe(b.settings.threads, arithmetics)
        for number, group in enumerate(b.groups):
            self._long.clear()
            for contender in group:
                if contender.name not in self._processes:
                    self._set_up(contender)
            for turn in range(number * b.rounds, (number + 1) * b.rounds):
                self._round(group, turn)
                self._listener.save(self.report())
            for contender in group:
                if contender != b.contenders[0]:
                    self._processes.pop(contender.name).close()

    def _set_up(self, contender: ModelContender) -> None:
        """Load the model, and make the first turns, which compile and which do not count."""
        works = self._benchmark.settings.works
        self._listener.note(f"{contender.name}: loading")
        process = self._processes[contender.name] = self._start(contender, self._benchmark.settings)
        try:
            loaded = process.set_up()
        except ContenderError as error:
            self._skipped[contender.name] = str(error)
            self._failed |= {(contender.name, work) for work in works}
            process.close()
            self._listener.advance(len(works))
            return
        self._keep(contender, loaded)
        for work in works:
            self._listener.note(f"{contender.name}: first {work}")
            if process.alive:
                self._first(contender.name, process, work)
            self._listener.advance(1)
        self._compare(contender.name, process)

    def _compare(self, name: str, process: ModelProcess) -> None:
        """Compare logits with those of the first contender, if the library shows them."""
        if not process.alive:
            return
        self._listener.note(f"{name}: logits")
        try:
            logits = process.logits()
        except ContenderError:
            return
        if name == self._benchmark.contenders[0].name:
            self._logits = logits
        elif self._logits is not None:
            self._errors[name] = float(np.linalg.norm(logits - self._logits) / np.linalg.norm(self._logits))

    def _keep(self, contender: ModelContender, loaded: Loaded) -> None:
        own = replace(
            contender,
            expert_bytes=loaded.facts.get("expert_bytes", contender.expert_bytes),
            dense_bytes=loaded.facts.get("dense_bytes", contender.dense_bytes),
        )
        settings = self._benchmark.settings
        self._contenders[own.name] = own
        self._demands[own.name] = {
            str(work): demand(self._benchmark.model, work, own.expert_bytes, own.dense_bytes, settings.steps)
            for work in settings.works
        }
        self._starts[own.name] = Start(
            loaded.load_seconds, loaded.resident_bytes, loaded.versions, {}, loaded.resident_bytes
        )

    def _first(self, name: str, process: ModelProcess, work: Work) -> None:
        begin = time.perf_counter()
        try:
            _, _, peak = process.time(work, -1, min(_FIRST_STEPS, self._benchmark.settings.steps))
        except ContenderError as error:
            self._leave_out(name, work, error)
            return
        start = self._starts[name]
        first = {**start.first_seconds, str(work): time.perf_counter() - begin}
        self._starts[name] = replace(start, first_seconds=first, peak_bytes=peak)

    def _round(self, group: Sequence[ModelContender], turn: int) -> None:
        for work in self._benchmark.settings.works:
            # Another one begins in each round, so that none is always the first after a pause.
            first = turn % len(group)
            before = self._measure_ceilings()
            for contender in (*group[first:], *group[:first]):
                self._listener.note(f"round {turn + 1}, {work}, {contender.name}")
                if (contender.name, work) not in self._failed | self._long:
                    before = self._turn(contender, work, turn, before)
                self._listener.advance(1)

    def _turn(self, contender: ModelContender, work: Work, turn: int, before: Ceilings) -> Ceilings:
        """Time one turn and return the ceilings right after it."""
        name, kind = contender.name, contender.arithmetic
        try:
            seconds, tokens, peak = self._processes[name].time(work, turn, self._benchmark.settings.steps)
        except ContenderError as error:
            self._leave_out(name, work, error)
            return self._measure_ceilings()
        after = self._measure_ceilings()
        self._starts[name] = replace(self._starts[name], peak_bytes=peak)
        if tokens:
            self._chosen.setdefault(name, {})[f"{work} {turn}"] = tokens
        if max(seconds) > self._benchmark.once_above:
            self._long.add((name, work))
        self._turns.append(
            Turn(
                contender=name,
                work=work,
                round=turn,
                calls=len(seconds),
                seconds=statistics.median(seconds),
                min_seconds=min(seconds),
                bandwidth=(before.bandwidth + after.bandwidth) / 2,
                flops=(before.flops[kind] + after.flops[kind]) / 2,
            )
        )
        return after

    def _leave_out(self, name: str, work: Work, error: ContenderError) -> None:
        """Ask a contender no more for what it could not do: for anything, if its process has ended."""
        ended = not self._processes[name].alive
        works = self._benchmark.settings.works if ended else (work,)
        self._failed |= {(name, w) for w in works}
        text = f"{'ended at ' if ended else ''}{work}: {error}"
        self._skipped[name] = "; ".join(filter(None, (self._skipped.get(name), text)))

    def _measure_ceilings(self) -> Ceilings:
        now = self._probe.measure()
        self._best = now.highest(self._best)
        return now
