"""Engines by trace: each prompt goes to all of them in turn, so that what is compared was measured at nearly the same
time. An engine whose turn it is not is stopped."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ktcompile.bench.listener import Listener
from ktcompile.bench.model.process import Loaded
from ktcompile.bench.prefix import traffic
from ktcompile.bench.prefix.contenders import EngineContender
from ktcompile.bench.prefix.process import EngineProcess, Settings
from ktcompile.bench.prefix.report import EnginesReport, Served, Start, Trace
from ktcompile.bench.process import ContenderError
from ktcompile.bench.serve.workload import Workload

# Tokens of prompts that do not count, and that nobody shares: what is made with the first ones is there afterwards.
_WARM_UPS = (100, 300)
_SAVES = 10  # for each trace

StartEngine = Callable[[EngineContender, Settings, Path], EngineProcess]


@dataclass(frozen=True, slots=True)
class EnginesBenchmark:
    """What to run. model: its name. workloads: prompts by the name of the trace. The first contender is what all are
    compared with."""

    model: str
    settings: Settings
    contenders: tuple[EngineContender, ...]
    workloads: dict[str, Workload]
    method: dict[str, Any]

    @property
    def turns(self) -> int:
        """Prompts in all, those of the warm-up included, if no contender drops out."""
        return len(self.contenders) * (len(_WARM_UPS) + sum(len(w.requests) for w in self.workloads.values()))


def run(
    benchmark: EnginesBenchmark, machine: dict[str, Any], listener: Listener, start: StartEngine = EngineProcess
) -> EnginesReport:
    """Return what was measured, up to Ctrl-C if that comes. machine: for the report. start: runs a contender."""
    with tempfile.TemporaryDirectory(prefix="ktc-bench-cache-") as folder:
        state = _Run(benchmark, machine, listener, start, Path(folder))
        try:
            state.measure()
        except KeyboardInterrupt:
            return replace(state.report(), interrupted=True)
        finally:
            state.close()
        return state.report()


class _Run:
    """What has been measured so far, and the engines that are in memory."""

    def __init__(
        self,
        benchmark: EnginesBenchmark,
        machine: dict[str, Any],
        listener: Listener,
        start: StartEngine,
        folder: Path,
    ) -> None:
        self._benchmark, self._machine, self._listener = benchmark, machine, listener
        self._start, self._folder = start, folder
        self._processes: dict[str, EngineProcess] = {}
        self._starts: dict[str, Start] = {}
        self._skipped: dict[str, str] = {}
        self._traces: list[Trace] = []
        self._served: list[Served] = []

    def report(self) -> EnginesReport:
        """Return what there is so far."""
        b = self._benchmark
        return EnginesReport(
            machine=self._machine,
            method={**b.method, "capacity": asdict(b.settings.capacity), "warm_ups": list(_WARM_UPS)},
            model=b.model,
            interrupted=False,
            contenders=b.contenders,
            starts=dict(self._starts),
            skipped=dict(self._skipped),
            traces=tuple(self._traces),
            served=tuple(self._served),
        )

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def measure(self) -> None:
        for contender in self._benchmark.contenders:
            self._set_up(contender)
        for name, workload in self._benchmark.workloads.items():
            self._replay(name, workload)

    def _set_up(self, contender: EngineContender) -> None:
        """Load the model, and compute what does not count."""
        b, name = self._benchmark, contender.name
        self._listener.note(f"{name}: loading")
        folder = self._folder / str(len(self._processes))
        process = self._processes[name] = self._start(contender, b.settings, folder)
        try:
            self._starts[name] = self._started(process.set_up())
            workload = next(iter(b.workloads.values()))
            for tokens in _WARM_UPS:
                generator = random.Random(f"warm-up {tokens}")
                count = min(tokens, b.settings.longest)
                process.first([generator.randrange(*workload.tokens) for _ in range(count)])
        except ContenderError as error:
            self._leave_out(name, "", error)
        self._listener.advance(len(_WARM_UPS))

    def _started(self, loaded: Loaded) -> Start:
        blocks = round(loaded.facts["kv_blocks"])
        return Start(loaded.load_seconds, blocks * self._benchmark.settings.capacity.block, loaded.versions)

    def _replay(self, name: str, workload: Workload) -> None:
        contenders = self._benchmark.contenders
        tokens = sum(r.input_tokens or 0 for r in workload.requests)
        self._traces.append(Trace(name, len(workload.requests), tokens, traffic.shared_tokens(workload)))
        saved = 0
        for index, prompt in enumerate(traffic.prompts(workload)):
            # Another one begins each time, so that none is always the first after a pause.
            first = index % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                self._listener.note(f"{name}, prompt {index + 1}, {contender.name}")
                if contender.name not in self._skipped:
                    self._turn(contender.name, name, index, prompt)
                self._listener.advance(1)
            if (done := (index + 1) * _SAVES // len(workload.requests)) > saved:
                saved = done
                self._listener.save(self.report())

    def _turn(self, contender: str, trace: str, index: int, prompt: list[int]) -> None:
        try:
            answer = self._processes[contender].first(prompt)
        except ContenderError as error:
            self._leave_out(contender, f"ended at prompt {index + 1} of {trace}: ", error)
            return
        self._served.append(
            Served(
                contender=contender,
                trace=trace,
                index=index,
                tokens=len(prompt),
                seconds=answer.seconds,
                wall_seconds=answer.wall_seconds,
                cpu_seconds=answer.cpu_seconds,
                token=answer.token,
                cached=answer.cached,
            )
        )

    def _leave_out(self, name: str, when: str, error: ContenderError) -> None:
        """Ask an engine no more: what its cache has is not what it would have."""
        self._skipped[name] = f"{when}{error}"
        self._processes[name].close()
