"""Metrics for Prometheus, under the names and with the meanings of vLLM's.

All that is counted here is told by the thread of the engine, at the end of each step.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from ktcompile.engine.outputs import FinishReason
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.runtime.prometheus import CONTENT_TYPE, families

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta, EngineStats
    from ktcompile.engine.receipt import Receipt
    from ktcompile.runtime.metrics import ExpertMetrics
    from ktcompile.scheduler.batch import Step

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

_LATEST = 1024
_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_LONG = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_BATCH = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Positions [begin, end) of a prompt, and the times between which they were computed."""

    begin: int
    end: int
    began: float
    ended: float


@dataclass(slots=True)
class Timing:
    """A request on its way, with times of time.monotonic. started: when its prompt's first tokens were computed.
    tokens: of all its answers. cached_tokens: of its prompt; receipt: of these. chunks: of its prompt, if anybody asks
    for them."""

    prompt_tokens: int
    unfinished: int
    arrival: float
    started: float | None = None
    first: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    receipt: Receipt | None = None
    last: dict[int, float] = field(default_factory=dict)  # by answer: when it had its last token
    chunks: list[PromptChunk] = field(default_factory=list)


class ServerMetrics:
    """An observer of the engine with a registry of its own.

    prefix: of all names, vLLM's as they are: "vllm:". ended: is told of each request that ended, why and when.
    evicted: likewise of how many blocks of the device that could be found were handed out again. tier_counters: what
    happened in the tiers behind it, by name.
    """

    def __init__(
        self,
        model: str,
        prefix: str,
        expert_metrics: Callable[[], ExpertMetrics | None],
        ended: Callable[[str, Timing, str, float], None] | None = None,
        evicted: Callable[[int], None] = lambda _: None,
        tier_counters: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Experts(expert_metrics))
        self.registry.register(_Tiers(tier_counters, model, prefix))
        self._ended, self._evicted = ended, evicted
        self._lock = threading.Lock()  # levels are noted by the engine's thread and by who asks for metrics
        self._requests: dict[str, Timing] = {}  # in the order of their arrival

        def make(kind: Any, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
            metric = kind(prefix + name, text, ("model_name", *labels), registry=self.registry, **more)
            return metric if labels else metric.labels(model)

        self._running = make(Gauge, "num_requests_running", "Sequences that are computed.")
        self._waiting = make(Gauge, "num_requests_waiting", "Sequences that wait.")
        self._kv_usage = make(Gauge, "kv_cache_usage_perc", "Part of the blocks of keys and values in use, 0 to 1.")
        self._preemptions = make(Counter, "num_preemptions", "Times that a sequence gave up its blocks.")
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts that were computed.")
        self._generated = make(Counter, "generation_tokens", "Tokens of answers.")
        self._cache_queries = make(Counter, "prefix_cache_queries", "Tokens of prompts that began to run.")
        self._cache_hits = make(Counter, "prefix_cache_hits", "Those of them that were cached.")
        evictions = "Blocks of the device that could be found and were handed out again."
        self._cache_evictions = make(Counter, "prefix_cache_evictions", evictions)
        self._rejections = make(Counter, "admission_rejections", "Requests that were refused.", ["reason"])
        self._success = make(Counter, "request_success", "Requests that ended.", ["finished_reason"])
        self._model = model

        def seconds(name: str, text: str, buckets: Sequence[float] = _LONG) -> Any:
            return make(Histogram, name, text, buckets=buckets)

        self._ttft = seconds("time_to_first_token_seconds", "From arrival to the first token.", _SHORT)
        self._itl = seconds("inter_token_latency_seconds", "From a token of an answer to its next.", _SHORT)
        self._e2e = seconds("e2e_request_latency_seconds", "From arrival to the end.")
        self._queue = seconds("request_queue_time_seconds", "From arrival to the begin of the prompt.")
        self._prefill = seconds("request_prefill_time_seconds", "From the begin of the prompt to the first token.")
        self._decode = seconds("request_decode_time_seconds", "From the first token to the end.")
        self._inference = seconds("request_inference_time_seconds", "From the begin of the prompt to the end.")
        self._of_prompt = make(Histogram, "request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS)
        self._of_answer = make(Histogram, "request_generation_tokens", "Tokens of its answers.", buckets=_TOKENS)
        self._iteration = make(Histogram, "iteration_tokens_total", "Tokens that a step gave.", buckets=_BATCH)
        self._n = make(Histogram, "request_params_n", "Answers that a request asks for.", buckets=(1, 2, 5, 10, 20))
        self._seen: defaultdict[Any, int] = defaultdict(int)  # totals that were counted
        self._latest_ttft: deque[float] = deque(maxlen=_LATEST)
        self._latest_itl: deque[float] = deque(maxlen=_LATEST)
        self.num_finished = self.num_rejected = 0

    def latencies(self) -> tuple[list[float], list[float]]:
        """Return the last times to a first token and between tokens, in seconds."""
        return list(self._latest_ttft), list(self._latest_itl)

    def text(self) -> bytes:
        """Return all samples, those of experts on a device too, in the text format."""
        return generate_latest(self.registry)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused."""
        self._rejections.labels(self._model, reason).inc()
        self.num_rejected += 1

    def added(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, arrival: float) -> None:
        self._requests[request_id] = Timing(num_prompt_tokens, params.n, arrival)
        self._of_prompt.observe(num_prompt_tokens)
        self._n.observe(params.n)

    def stepped(self, deltas: Sequence[Delta], stats: EngineStats, step: Step | None, seconds: float) -> None:
        now = time.monotonic()
        if step is not None:
            self._note_prompts(step, now - seconds, now)
        self.level(stats)
        tokens = 0
        for delta in deltas:
            request = self._requests.get(delta.request_id)
            if request is None:
                continue
            tokens += len(delta.token_ids)
            self._take(request, delta, now)
            if delta.finish_reason is not None:
                request.unfinished -= 1
                if request.unfinished == 0:
                    self._end(delta.request_id, delta.finish_reason, now)
        self._generated.inc(tokens)
        self._iteration.observe(tokens)

    def dropped(self, request_id: str, reason: FinishReason) -> None:
        if request_id in self._requests:
            self._end(request_id, reason, time.monotonic())

    def level(self, stats: EngineStats) -> None:
        """Note how full the engine is."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        with self._lock:
            for counter, total in (
                (self._preemptions, stats.num_preemptions),
                (self._cache_queries, stats.prefix_cache_queries),
                (self._cache_hits, stats.prefix_cache_hits),
            ):
                self._count(counter, total)
            evicted = self._count(self._cache_evictions, stats.prefix_cache_evictions)
        if evicted:
            self._evicted(evicted)

    def _count(self, counter: Any, total: int) -> int:
        """Have a counter come to a total, and return by how much it grew."""
        more = max(0, total - self._seen[counter])
        counter.inc(more)
        self._seen[counter] += more
        return more

    def _note_prompts(self, step: Step, began: float, ended: float) -> None:
        """Note of requests that have no token yet what the step computed of their prompts."""
        for chunk in step.chunks:
            request = self._requests.get(chunk.request_id.rpartition("/")[0])
            if request is None or request.first is not None:
                continue
            if request.started is None:
                request.started = began
            if self._ended is not None:
                request.chunks.append(PromptChunk(chunk.begin, chunk.end, began, ended))

    def _take(self, request: Timing, delta: Delta, now: float) -> None:
        if not delta.token_ids:
            return
        request.tokens += len(delta.token_ids)
        if request.first is None:
            assert request.started is not None, "a token came before its prompt"
            request.first = now
            self._ttft.observe(now - request.arrival)
            self._latest_ttft.append(now - request.arrival)
            self._queue.observe(request.started - request.arrival)
            self._prefill.observe(now - request.started)
            self._prompt_tokens.inc(request.prompt_tokens)
        if delta.index == 0:
            request.cached_tokens, request.receipt = delta.num_cached_tokens, delta.receipt
        if delta.index in request.last:
            self._itl.observe(now - request.last[delta.index])
            self._latest_itl.append(now - request.last[delta.index])
        request.last[delta.index] = now

    def _end(self, request_id: str, reason: FinishReason, now: float) -> None:
        request = self._requests.pop(request_id)
        self._success.labels(self._model, reason).inc()
        self.num_finished += 1
        self._e2e.observe(now - request.arrival)
        if request.first is not None and request.started is not None:
            self._decode.observe(now - request.first)
            self._inference.observe(now - request.started)
        self._of_answer.observe(request.tokens)
        if self._ended is not None:
            self._ended(request_id, request, reason, now)


class _Experts:
    """Collects the metrics of experts on a device when they are asked for."""

    def __init__(self, metrics: Callable[[], ExpertMetrics | None]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        found = self._metrics()
        for name, kind, text, samples in families(found) if found is not None else ():
            family = Metric(name.removesuffix("_total"), text, kind)
            for labels, value in samples:
                family.add_sample(name, labels, value)
            yield family


class _Tiers:
    """Collects what happened in the tiers behind the device when it is asked for: hits, moves, failures."""

    def __init__(self, counters: Callable[[], dict[str, int]], model: str, prefix: str) -> None:
        self._counters, self._model, self._prefix = counters, model, prefix

    def collect(self) -> Iterator[Metric]:
        for name, value in self._counters().items():
            text = f"{name.replace('_', ' ')} of the prefix cache behind the device, in blocks unless it names a unit."
            family = Metric(f"{self._prefix}kv_tier_{name}", text, "counter")
            family.add_sample(f"{self._prefix}kv_tier_{name}_total", {"model_name": self._model}, value)
            yield family
