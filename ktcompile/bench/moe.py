"""One MoE layer on ktcompile and on its peers, in one interleaved run.

Each contender has a process of its own, which is stopped while it is not its turn: threads that spin while they
wait, as some peers' do, then take nothing from the others.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import psutil

from ktcompile.bench.roofline import Roofline
from ktcompile.bench.shapes import MoeShape
from ktcompile.quant import FORMATS

OURS = "ktcompile"
PEERS = ("transformers eager", "transformers grouped_mm", "kt-kernel")
# What a relative error may be before a contender's times are refused.
_ERROR_BUDGET = {"bfloat16": 0.02, "float16": 0.004, "float32": 1e-4}


@dataclass(frozen=True, slots=True)
class MoeBenchmark:
    """What to run. tokens: token counts. rounds: turns of each contender per token count. layers: weights that
    take turns. contenders: names of `available_contenders`. dtype: of weights and activations."""

    shape: MoeShape
    tokens: tuple[int, ...]
    contenders: tuple[str, ...]
    threads: int
    dtype: str = "bfloat16"
    weight_format: str = "auto"
    isa: str | None = None
    rounds: int = 5
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"token counts are {list(self.tokens)}; each must be 1 or more")
        needed = 2 * self.layers * self.shape.bytes(self.shape.num_experts, 2) * len(self.contenders)
        free = psutil.virtual_memory().available
        if needed > free:
            raise ValueError(
                f"{len(self.contenders)} contenders with {self.shape.num_experts} experts need about "
                f"{needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free; use fewer with --experts"
            )

    @property
    def bytes_per_weight(self) -> float:
        if self.weight_format != "auto":
            return FORMATS[self.weight_format].bytes_per_weight
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True, slots=True)
class MoeResult:
    """One contender at one token count. seconds: median; fraction: of the roofline, of the median."""

    contender: str
    tokens: int
    seconds: float
    min_seconds: float
    bytes_per_second: float
    flops_per_second: float
    fraction: float
    best_fraction: float


@dataclass(frozen=True, slots=True)
class MoeReport:
    """errors: relative error of each contender against fp64. skipped: contenders that failed, and why."""

    benchmark: MoeBenchmark
    roofline: Roofline
    errors: dict[str, float]
    skipped: dict[str, str]
    results: tuple[MoeResult, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def available_contenders() -> tuple[str, ...]:
    """Return ktcompile and the peers that are installed."""
    peers = [p for p in PEERS if p != "kt-kernel" or importlib.util.find_spec("kt_kernel")]
    return (OURS, *peers)


def run(benchmark: MoeBenchmark, progress: Callable[[str], None]) -> MoeReport:
    """Run all token counts and return what came of it; `progress` is told what goes on."""
    workers: dict[str, _Worker] = {}
    skipped: dict[str, str] = {}
    try:
        for name in benchmark.contenders:
            progress(f"setting up {name}")
            try:
                workers[name] = _Worker(name, benchmark)
            except RuntimeError as error:
                if name == OURS:
                    raise
                skipped[name] = str(error)
        ceilings = [workers[OURS].ceilings]
        times: dict[tuple[str, int], list[_Call]] = {(w, t): [] for t in benchmark.tokens for w in workers}
        for turn in range(benchmark.rounds):
            for tokens in benchmark.tokens:
                for name, worker in workers.items():
                    progress(f"round {turn + 1} of {benchmark.rounds}: {tokens} tokens, {name}")
                    repeats = max(2, min(40, 512 // tokens))
                    times[name, tokens] += worker.time(tokens, repeats, seed=1000 * turn)
            ceilings.append(workers[OURS].measure_ceilings())
        errors = {name: worker.error for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    roofline = Roofline(max(c.bandwidth for c in ceilings), max(c.flops for c in ceilings))
    results = tuple(_result(benchmark, roofline, name, tokens, calls) for (name, tokens), calls in times.items())
    return MoeReport(benchmark, roofline, errors, skipped, results)


class _Call(NamedTuple):
    seconds: float
    distinct_experts: float


def _result(b: MoeBenchmark, roofline: Roofline, name: str, tokens: int, calls: Sequence[_Call]) -> MoeResult:
    bytes_read = b.shape.bytes(statistics.mean(c.distinct_experts for c in calls), b.bytes_per_weight)
    flops = b.shape.flops(tokens)
    bound = roofline.seconds(bytes_read, flops)
    median, least = statistics.median(c.seconds for c in calls), min(c.seconds for c in calls)
    return MoeResult(name, tokens, median, least, bytes_read / median, flops / median, bound / median, bound / least)


class _Worker:
    """A contender's process. RuntimeError: it cannot be set up, or computes something else."""

    def __init__(self, name: str, benchmark: MoeBenchmark) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ktcompile.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        setup = {"contender": name, **asdict(benchmark.shape)}
        for key in ("layers", "dtype", "threads", "seed", "weight_format", "isa"):
            setup[key] = getattr(benchmark, key)
        try:
            answer = self._ask(setup)
            self.error = answer["error"]
            if self.error > _ERROR_BUDGET[benchmark.dtype]:
                raise RuntimeError(f"its result is wrong: relative error {self.error:.3g}")
        except RuntimeError:
            self.close()
            raise
        if name == OURS:
            self.ceilings = Roofline(answer["bandwidth"], answer["flops"])

    def time(self, tokens: int, repeats: int, seed: int) -> list[_Call]:
        answer = self._ask({"tokens": tokens, "repeats": repeats, "seed": seed})
        return [_Call(*call) for call in zip(answer["seconds"], answer["distinct"], strict=True)]

    def measure_ceilings(self) -> Roofline:
        answer = self._ask({"ceilings": True})
        return Roofline(answer["bandwidth"], answer["flops"])

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; what it said last is read below
        for line in self._process.stdout:
            if line.startswith("@"):
                self._process.send_signal(signal.SIGSTOP)
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        _, complaint = self._process.communicate()
        raise RuntimeError((complaint.strip().splitlines() or ["it ended without a word"])[-1])
