"""Traces replayed through strategies of placement. All times are simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ktcompile.plan.bound import lower_bound
from ktcompile.plan.cost import Way
from ktcompile.plan.demand import Demand
from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.forecast import Forecast
from ktcompile.plan.hardware import Hardware
from ktcompile.plan.interval import Interval, IntervalCost, dense_seconds
from ktcompile.plan.placement import budget_of, place
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.replan import ReplanConfig, replan
from ktcompile.plan.residency import Moves, Residency
from ktcompile.plan.table import ExpertTable, Floats, Mask
from ktcompile.plan.trace import Trace

# By name: the placement that each begins with. `kt-` names follow KTransformers' rules: prompts of `kt_threshold`
# tokens and more are streamed whatever it costs, others never; `kt-dynamic` then has each layer's most used experts of
# that prompt stay. `clairvoyant` is a bound, and `oracle` a placement that knows each interval in advance.
STRATEGIES = {
    "uniform": "uniform",
    "front": "front",
    "random": "random",
    "frequency": "frequency",
    "adaptive": "adaptive",
    "kt-uniform": "uniform",
    "kt-front": "front",
    "kt-random": "random",
    "kt-frequency": "counts",
    "kt-dynamic": "uniform",
    "oracle": "frequency",
    "clairvoyant": "uniform",
}


@dataclass(frozen=True, slots=True)
class Result:
    """A strategy's simulated run over a trace, with a fraction of the experts on the device.

    seconds: of all steps; decode_seconds: of decode steps. generated: tokens of decode steps. hit_rate: share of the
    tokens' experts that were on the device. swaps: experts moved to the device; moved_bytes: by moves in both
    directions; streamed_bytes: of cold experts copied for one step. cpu_busy, device_busy: seconds; overlap: seconds
    in which both work. hits, uses [L, E]: tokens, on the device and in all.
    """

    strategy: str
    fraction: float
    seconds: float
    decode_seconds: float
    generated: int
    hit_rate: float = 0.0
    swaps: int = 0
    moved_bytes: float = 0.0
    streamed_bytes: float = 0.0
    cpu_busy: float = 0.0
    device_busy: float = 0.0
    overlap: float = 0.0
    hits: Floats = field(default_factory=lambda: np.zeros((0, 0)), compare=False, repr=False)
    uses: Floats = field(default_factory=lambda: np.zeros((0, 0)), compare=False, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole run, prompts included in the time."""
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second of decode steps."""
        return self.generated / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs share.

    kt_threshold: prompt tokens from which KTransformers' rules stream. kt_sync: seconds that `kt-` strategies lose in a
    decode step for each layer with any expert on the CPU, used or not.
    """

    facts: ModelFacts
    hardware: Hardware
    profile: RoutingProfile | None = None
    config: ReplanConfig = ReplanConfig()  # noqa: RUF009 (it is frozen)
    kt_threshold: int = 512
    kt_sync: float = 0.0
    seed: int = 0


def simulate(
    trace: Trace,
    setting: Setting,
    strategies: Sequence[str],
    fractions: Sequence[float],
    progress: Callable[[float], None] = lambda share: None,
) -> list[Result]:
    """Return the results of each strategy at each fraction of experts on the device, in this order.

    ValueError: a strategy is unknown or lacks its profile, a fraction is not from 0 to 1, the trace does not fit the
    model or has no steps.
    """
    table = ExpertTable.of(setting.facts, setting.hardware)
    if (trace.num_layers, trace.num_experts) != table.shape:
        have = (trace.num_layers, trace.num_experts)
        raise ValueError(f"the trace is of {have} layers and experts; the model has {table.shape}")
    if not trace.num_steps:
        raise ValueError("the trace has no steps")
    runs = [_run(name, fraction, setting, table) for name in strategies for fraction in fractions]
    forecast = Forecast(table.shape, table.top_k, setting.profile)
    for begin, end in trace.runs(setting.config.interval):
        interval = Interval(trace, begin, end, table)
        dense = dense_seconds(setting.facts, setting.hardware, interval.tokens.astype(np.float64))
        costs = [run.step(interval, dense) for run in runs]
        _replan_all(runs, costs, interval, forecast, setting.config)
        progress(end / trace.num_steps)
    return [run.result() for run in runs]


def _run(name: str, fraction: float, setting: Setting, table: ExpertTable) -> _Run:
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown; there are {', '.join(STRATEGIES)}")
    budget = budget_of(setting.facts, fraction)
    start = STRATEGIES[name]
    if name == "oracle" and setting.profile is None:
        start = "uniform"
    plan = place(start, setting.facts, setting.hardware, budget, setting.profile, setting.seed)
    kinds = {"adaptive": _Adaptive, "kt-dynamic": _KtDynamic, "oracle": _Oracle, "clairvoyant": _Bound}
    return kinds.get(name, _Run)(name, fraction, Residency(plan), table, setting)


def _replan_all(
    runs: list[_Run], costs: list[float], interval: Interval, forecast: Forecast, config: ReplanConfig
) -> None:
    """Let the planners see the interval and change what holds from the next one on.

    Copies for the next interval run in the last part of this one, so the planners do not know that part's counts. An
    interval cut short by a prompt ends before that part, and nothing changes; the prompt's own copies run beside it.
    """
    steps = interval.num_steps
    known = 1 if interval.phase is Phase.PREFILL else max(1, round(steps * (1 - config.link_share)))
    _observe(forecast, interval, 0, known)
    if interval.phase is Phase.PREFILL or steps == config.interval:
        demand = forecast.demand()
        for run, seconds in zip(runs, costs, strict=True):
            run.replan(interval, seconds, demand)
    if known < steps:
        _observe(forecast, interval, known, steps)


def _observe(forecast: Forecast, interval: Interval, first: int, last: int) -> None:
    rows, touched = interval.counts(first, last)
    forecast.observe(rows, touched, float(interval.tokens[first:last].sum()), last - first, interval.phase)


class _Run:
    """One strategy at one fraction; a static one unless a subclass changes the placement."""

    def __init__(self, name: str, fraction: float, residency: Residency, table: ExpertTable, setting: Setting) -> None:
        self.name, self.fraction, self.residency, self.table, self.setting = name, fraction, residency, table, setting
        self.sums = dict.fromkeys(
            ("seconds", "decode_seconds", "moved_bytes", "streamed_bytes", "cpu_busy", "device_busy", "overlap"), 0.0
        )
        self.generated = self.swaps = 0
        self.hits, self.uses = np.zeros(table.exists.size), np.zeros(table.exists.size)
        self.cost: IntervalCost | None = None

    def way(self, interval: Interval) -> Way:
        if not self.name.startswith("kt-"):
            return "cheaper"
        long = interval.phase is Phase.PREFILL and int(interval.tokens[0]) >= self.setting.kt_threshold
        return "streamed" if long else "split"

    def step(self, interval: Interval, dense: Floats) -> float:
        """Add an interval and return its seconds."""
        cost = self.cost = interval.cost(self.residency.resident, self.way(interval))
        self.sums["cpu_busy"] += float(cost.layers.cpu.sum())
        self.sums["device_busy"] += float(cost.layers.device.sum() + dense.sum())
        self.sums["overlap"] += float(np.minimum(cost.layers.cpu, cost.layers.device).sum())
        self.sums["streamed_bytes"] += cost.streamed_bytes
        self.hits += cost.hits
        self.uses += interval.per_expert(interval.rows).reshape(-1)
        return self._spent(float(cost.layers.total.sum() + dense.sum()) + self._waits(interval), interval)

    def _waits(self, interval: Interval) -> float:
        if not self.name.startswith("kt-") or interval.phase is Phase.PREFILL:
            return 0.0
        mixed = (self.table.exists & ~self.residency.resident).any(axis=1).sum()
        return self.setting.kt_sync * float(mixed) * interval.num_steps

    def _spent(self, seconds: float, interval: Interval) -> float:
        self.sums["seconds"] += seconds
        if interval.phase is Phase.DECODE:
            self.sums["decode_seconds"] += seconds
            self.generated += int(interval.tokens.sum())
        return seconds

    def replan(self, interval: Interval, seconds: float, demand: Demand) -> None:
        """Change the placement from the next interval on, knowing what the interval took."""

    def result(self) -> Result:
        uses = self.uses.sum()
        rate = float(self.hits.sum() / uses) if uses else 0.0
        shape = self.table.shape
        return Result(
            self.name,
            self.fraction,
            generated=self.generated,
            hit_rate=rate,
            swaps=self.swaps,
            hits=self.hits.reshape(shape),
            uses=self.uses.reshape(shape),
            **self.sums,
        )


class _Adaptive(_Run):
    def replan(self, interval: Interval, seconds: float, demand: Demand) -> None:
        assert self.cost is not None
        config, cost = self.setting.config, self.cost
        prefill = interval.phase is Phase.PREFILL
        idle = max(seconds - float(cost.layers.copy.sum()), 0.0)
        busy = min(cost.cpu_read / seconds, 1.0) if seconds else 0.0
        moves = replan(
            self.table,
            demand,
            self.residency.resident,
            self.residency.budget_bytes,
            idle * config.link_share,
            config,
            busy,
            self._passing(interval, cost) if prefill else None,
        )
        self._make(moves, interval, busy)

    def _passing(self, interval: Interval, cost: IntervalCost) -> Mask:
        """Return the experts whose weights were streamed in a prefill step."""
        used = np.zeros(self.table.exists.size, dtype=np.bool_)
        used[interval.expert[cost.layers.streamed[interval.slot]]] = True
        return used.reshape(self.table.shape) & ~self.residency.resident

    def _make(self, moves: Moves, interval: Interval, busy: float) -> None:
        """Make moves, charging the memory bandwidth that they take from the CPU while it reads weights."""
        size = np.repeat(self.table.bytes, self.table.shape[1])[moves.experts]
        self.residency.apply(moves)
        self.swaps += int(moves.to_device.sum())
        self.sums["moved_bytes"] += float(size.sum())
        self._charge(float(size.sum()) / self.table.hardware.cpu.bandwidth * busy, interval)

    def _charge(self, seconds: float, interval: Interval) -> None:
        self.sums["seconds"] += seconds
        if interval.phase is Phase.DECODE:
            self.sums["decode_seconds"] += seconds


class _KtDynamic(_Run):
    def replan(self, interval: Interval, seconds: float, demand: Demand) -> None:
        if interval.phase is not Phase.PREFILL or self.way(interval) != "streamed":
            return
        rows, _ = interval.counts(0, 1)
        rows[~self.table.exists] = -1
        rank = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
        old = self.residency.resident
        new = rank < old.sum(axis=1, keepdims=True)
        # It keeps all experts in host memory, so that nothing is copied back, and copies come with the stream.
        out, into = np.flatnonzero(old & ~new), np.flatnonzero(new & ~old)
        experts = np.concatenate([out, into])
        self.residency.apply(Moves(experts, np.arange(len(experts)) >= len(out), 0.0, 0.0))
        self.swaps += len(into)


class _Oracle(_Run):
    def step(self, interval: Interval, dense: Floats) -> float:
        weight = np.minimum(interval.cpu, interval.link[interval.slot])
        sums = interval.per_expert(weight).reshape(-1)
        size = np.repeat(self.table.bytes, self.table.shape[1])
        order = np.argsort(-sums / size, kind="stable")
        order = order[sums[order] > 0]
        new = np.zeros(len(sums), dtype=np.bool_)
        new[order[np.cumsum(size[order]) <= self.residency.budget_bytes]] = True
        old = self.residency.resident.reshape(-1)
        out, into = np.flatnonzero(old & ~new), np.flatnonzero(new & ~old)
        experts = np.concatenate([out, into])
        self.residency.apply(Moves(experts, np.arange(len(experts)) >= len(out), 0.0, 0.0))
        return super().step(interval, dense)


class _Bound(_Run):
    def step(self, interval: Interval, dense: Floats) -> float:
        bound = lower_bound(interval, self.residency.budget_bytes)
        return self._spent(bound + float(dense.sum()), interval)
