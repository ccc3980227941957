"""MoE layers by format, instruction set, token count and shape, beside the machine's ceilings and beside peers.

The memory bandwidth of a shared machine moves by half within seconds. So the ceilings are measured again before and
after each turn of each contender, and contenders take turns: what is compared was measured at nearly the same time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from ktcompile.bench import contenders as who
from ktcompile.bench import worker
from ktcompile.bench.contenders import Contender
from ktcompile.bench.listener import Listener
from ktcompile.bench.process import ContenderError, ContenderProcess
from ktcompile.bench.report import KernelsReport, ShapeReport, Turn
from ktcompile.bench.roofline import Ceilings, Probe, cache_bytes, probe_bytes
from ktcompile.bench.shapes import MoeShape
from ktcompile.ops import ExpertsSpec, reference

_CHECKED_TOKENS = 3
# The rest is for who else is on the machine.
_USABLE_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class KernelsBenchmark:
    """What to run.

    shapes: by name. cut_experts: whether a shape may get fewer experts, to fit into memory. tokens: token counts.
    absent: peers that are not there, and why. rounds: turns of each contender per token count. budget: seconds of
    a turn, in which a long call is let finish.
    """

    shapes: dict[str, MoeShape]
    cut_experts: bool
    contenders: tuple[Contender, ...]
    tokens: tuple[int, ...]
    absent: dict[str, str]
    threads: int
    rounds: int = 5
    budget: float = 0.15

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"token counts are {list(self.tokens)}; each must be 1 or more")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.cut_experts:
            for shape in self.shapes.values():
                who.check_fit(self.contenders, shape, max(self.tokens), usable_memory())

    @property
    def turns(self) -> int:
        """Turns in all, if no contender drops out."""
        return len(self.shapes) * self.rounds * len(self.tokens) * len(self.contenders)

    def method(self) -> dict[str, Any]:
        """Return what a reader of the results has to know."""
        return {
            "tokens": list(self.tokens),
            "rounds": self.rounds,
            "turn_seconds": self.budget,
            "probe_bytes": probe_bytes(),
            "cache_bytes": cache_bytes(),
            "dtype": "bfloat16",
            "routing": "uniform; experts that were read longest ago are touched next",
        }


def run(
    benchmark: KernelsBenchmark,
    machine: dict[str, Any],
    listener: Listener,
    start: Callable[[], ContenderProcess] = ContenderProcess,
    make_probe: Callable[[int, Sequence[str]], Probe] = Probe,
) -> KernelsReport:
    """Return what was measured, up to Ctrl-C if that comes. machine: for the report.

    start, make_probe: what runs contenders and what measures the ceilings.
    """
    done: list[ShapeReport] = []
    current: _ShapeRun | None = None
    interrupted = False

    def report() -> KernelsReport:
        shapes = (*done, *([current.report()] if current else ()))
        return KernelsReport(machine, benchmark.method(), interrupted, shapes)

    try:
        probe = make_probe(benchmark.threads, [c.arithmetic for c in benchmark.contenders])
        for name, shape in benchmark.shapes.items():
            current = _ShapeRun(benchmark, name, shape, probe, listener)
            current.run(start, lambda: listener.save(report()))
            done.append(current.report())
            current = None
    except KeyboardInterrupt:
        interrupted = True
    return report()


def usable_memory() -> int:
    """Return how many bytes a benchmark may take now."""
    return int(psutil.virtual_memory().available * _USABLE_MEMORY)


class _ShapeRun:
    """One shape, and what has been measured of it so far."""

    def __init__(
        self, benchmark: KernelsBenchmark, name: str, shape: MoeShape, probe: Probe, listener: Listener
    ) -> None:
        self._benchmark, self._name, self._probe, self._listener = benchmark, name, probe, listener
        self._shape = shape
        self._contenders: dict[str, Contender] = {}
        self._processes: dict[str, ContenderProcess] = {}
        self._notes: list[str] = []
        self._skipped = dict(benchmark.absent)
        self._best: Ceilings | None = None
        self._turns: list[Turn] = []

    def report(self) -> ShapeReport:
        """Return what there is so far."""
        contenders = tuple(self._contenders.values())
        notes, turns = tuple(self._notes), tuple(self._turns)
        return ShapeReport(self._name, self._shape, contenders, notes, dict(self._skipped), self._best, turns)

    def run(self, start: Callable[[], ContenderProcess], save: Callable[[], None]) -> None:
        """Measure all rounds; call `save` after each."""
        b = self._benchmark
        planned = self._plan()
        wanted = _reference(self._shape)
        groups = who.processes(planned)
        # All are started at once, since importing a library takes seconds.
        processes = [start() for _ in groups]
        try:
            for process, group in zip(processes, groups, strict=True):
                self._set_up(process, group, wanted)
            self._contenders = {c.name: self._contenders[c.name] for c in planned if c.name in self._contenders}
            self._listener.advance(b.rounds * len(b.tokens) * (len(planned) - len(self._contenders)))
            for turn in range(b.rounds):
                self._round(turn)
                save()
        finally:
            for process in processes:
                process.close()

    def _plan(self) -> tuple[Contender, ...]:
        """Return the contenders with the copies of the weights that they need."""
        b = self._benchmark
        if b.cut_experts:
            wanted = self._shape.num_experts
            self._shape = who.fit_experts(b.contenders, self._shape, max(b.tokens), usable_memory())
            if self._shape.num_experts < wanted:
                kept = f"{self._shape.num_experts} of {wanted} experts"
                self._notes.append(f"{kept}: as many as are useful and fit into memory; --experts asks for a number")
        planned = who.with_layers(b.contenders, self._shape, cache_bytes())
        cached = [c.name for c in planned if who.fits_in_cache(c, self._shape, cache_bytes())]
        if cached:
            self._notes.append(f"weights may come from the cache, fractions may exceed 1: {', '.join(cached)}")
        return planned

    def _set_up(self, process: ContenderProcess, group: Sequence[Contender], wanted: torch.Tensor) -> None:
        """Keep those contenders of a process that compute the rows `wanted`."""
        self._listener.note(f"{self._name}: packing for {', '.join(c.name for c in group)}")
        try:
            self._skipped |= process.set_up(group, self._shape, max(self._benchmark.tokens))
        except ContenderError as error:
            self._skipped |= {c.name: str(error) for c in group}
        for contender in group:
            if contender.name in self._skipped:
                continue
            try:
                rows = torch.tensor(process.rows(contender.name, _CHECKED_TOKENS), dtype=torch.float64)
            except ContenderError as error:
                self._skipped[contender.name] = str(error)
                continue
            relative = float((rows - wanted).norm() / wanted.norm())
            if not relative <= contender.error_limit:  # NaN is not
                limit = f"{contender.error_limit:.3g} is allowed"
                self._skipped[contender.name] = f"its result is wrong: the relative error is {relative:.3g}, {limit}"
                continue
            self._contenders[contender.name] = replace(contender, error=relative)
            self._processes[contender.name] = process

    def _round(self, turn: int) -> None:
        for tokens in self._benchmark.tokens:
            names = list(self._contenders)
            # Another one begins in each round, so that none is always the first after a pause.
            first = turn % max(1, len(names))
            before = self._measure_ceilings()
            for name in names[first:] + names[:first]:
                self._listener.note(f"{self._name}: round {turn + 1}, {tokens} tokens, {name}")
                if name not in self._skipped:
                    before = self._turn(self._contenders[name], tokens, turn, before)
                self._listener.advance(1)

    def _turn(self, contender: Contender, tokens: int, turn: int, before: Ceilings) -> Ceilings:
        """Time one turn and return the ceilings right after it."""
        try:
            process = self._processes[contender.name]
            seconds, distinct = process.time(contender.name, tokens, turn, self._benchmark.budget)
        except ContenderError as error:
            self._skipped[contender.name] = f"ended at {tokens} tokens: {error}"
            return self._measure_ceilings()
        after = self._measure_ceilings()
        kind = contender.arithmetic
        self._turns.append(
            Turn(
                contender=contender.name,
                tokens=tokens,
                round=turn,
                calls=len(seconds),
                seconds=statistics.median(seconds),
                min_seconds=min(seconds),
                distinct_experts=statistics.mean(distinct),
                bandwidth=(before.bandwidth + after.bandwidth) / 2,
                flops=(before.flops[kind] + after.flops[kind]) / 2,
            )
        )
        return after

    def _measure_ceilings(self) -> Ceilings:
        now = self._probe.measure()
        self._best = now.highest(self._best)
        return now


def _reference(shape: MoeShape) -> torch.Tensor:
    """Return the rows [T, H] that contenders are compared with, in fp64."""
    dimensions = worker.Dimensions(shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
    x_TH, weights_TK = worker.make_inputs(dimensions, _CHECKED_TOKENS)
    ids_TK = worker.make_checked_ids(dimensions, _CHECKED_TOKENS)
    return reference.moe(x_TH, ids_TK, weights_TK, *worker.make_source(dimensions), ExpertsSpec())
