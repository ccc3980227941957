"""Spans of OpenTelemetry, with the attributes of its conventions for generative AI (extra `otel`).

A request is a span `chat MODEL` or `text_completion MODEL` of the caller's trace, with the parts `queue`, `prefill`, of
which each chunk of the prompt is a part, and `decode`. Tokens that it found in a tier of the prefix cache are an event
`kv_hit`, and waiting for them is a part `kv_promote` (what it loads anew after it was preempted is counted alone). A
request that brings the results of calls is linked to those whose answers made the calls. What moves in the tiers for no
request (blocks that are demoted or evicted, bytes that are damaged) is a span `kv_tier_NAME` of a trace of its own, by
the name of its counter. No prompt and no answer is in them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ktcompile.server.metrics import Timing
from ktcompile.server.usage import Prices

if TYPE_CHECKING:
    from ktcompile.engine.receipt import Receipt
    from ktcompile.server.service import Ask

_FAILED = ("error", "timeout", "abort")
# Requests and calls of tools whose spans are remembered, for links to them.
_REMEMBERED = 4096
# What happens in tiers for no request, by the counters of `ktcompile.cache.counters`, and what of it is a failure.
_DAMAGED = frozenset({"host_verify_failed", "disk_verify_failed"})
_MOVED = frozenset({"demoted", "disk_stored", "device_evicted", "host_evicted", "disk_evicted", "disk_quarantined"})


class Tracing:
    """Makes the spans of requests by the provider that the process has set. prices: None where they are not known."""

    def __init__(self, model: str, prices: Prices | None) -> None:
        self._model = model
        self._prices = prices
        self._tracer = trace.get_tracer("ktcompile")
        self._spans: dict[str, Span] = {}
        self._recent: dict[str, SpanContext] = {}  # by request
        self._calls: dict[str, SpanContext] = {}  # by call of a tool
        # Spans have the time of the calendar, what happens in the engine that of time.monotonic.
        self._offset = time.time_ns() - time.monotonic_ns()

    def begin(self, request_id: str, ask: Ask) -> None:
        """Begin the span of a request, within the trace that its headers name."""
        params = ask.params
        operation = "text_completion" if ask.request.url.path == "/v1/completions" else "chat"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ktcompile",
            "gen_ai.request.model": self._model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.id": request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": len(ask.ids),
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        if params.seed is not None:
            attributes["gen_ai.request.seed"] = params.seed
        calls = [(name, self._calls[name]) for name in ask.tool_call_ids if name in self._calls]
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(ask.request.headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            links=[Link(context, {"gen_ai.tool.call.id": name}) for name, context in calls],
        )
        self._spans[request_id] = span
        _remember(self._recent, request_id, span.get_span_context())

    def called(self, request_id: str, call_ids: Sequence[str]) -> None:
        """Note which calls of tools the answer of a request has."""
        for name in call_ids:
            if request_id in self._recent:
                _remember(self._calls, name, self._recent[request_id])

    def refused(self, request_id: str, why: str) -> None:
        """End the span of a request that the engine did not take, if it is not over already."""
        span = self._spans.pop(request_id, None)
        if span is not None:
            span.set_attribute("error.type", why)
            span.set_status(Status(StatusCode.ERROR))
            span.end()

    def ended(self, request_id: str, timing: Timing, reason: str, now: float) -> None:
        """End the span of a request, with its parts. Runs in the thread of the engine."""
        span = self._spans.pop(request_id, None)
        if span is None:
            return
        parts = (
            ("queue", timing.arrival, timing.started),
            ("prefill", timing.started, timing.first),
            ("decode", timing.first, now),
        )
        for name, begin, end in parts:
            if begin is not None:
                part = self._part(name, span, begin)
                for chunk in timing.chunks if name == "prefill" else ():
                    places = {"ktcompile.chunk.begin": chunk.begin, "ktcompile.chunk.end": chunk.end}
                    self._part("prefill_chunk", part, chunk.began, places).end(self._calendar(chunk.ended))
                part.end(self._calendar(now if end is None else end))
        if timing.receipt is not None and timing.started is not None:
            self._note_receipt(span, timing.receipt, timing.started)
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        span.set_attribute("gen_ai.usage.output_tokens", timing.tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", timing.cached_tokens)
        if self._prices is not None:
            cost = self._prices.cost(timing.prompt_tokens, timing.cached_tokens, timing.tokens)
            span.set_attribute("ktcompile.usage.cost", cost)
        if reason in _FAILED:
            span.set_attribute("error.type", reason)
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._calendar(now))

    def happened(self, counter: str, blocks: int) -> None:
        """Make the span of what happened to blocks, if it belongs to no request. Runs in any thread."""
        if counter not in _MOVED and counter not in _DAMAGED:
            return
        span = self._tracer.start_span(f"kv_tier_{counter}", Context(), attributes={"ktcompile.kv.blocks": blocks})
        if counter in _DAMAGED:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _note_receipt(self, span: Span, receipt: Receipt, started: float) -> None:
        """Say where what was not computed of a prompt came from. started: when the first of the rest was."""
        found = {"device": receipt.device_tokens, "host": receipt.host_tokens, "disk": receipt.disk_tokens}
        for tier, tokens in found.items():
            if tokens:
                attributes: dict[str, str | int] = {"ktcompile.kv.tier": tier, "ktcompile.kv.tokens": tokens}
                span.add_event("kv_hit", attributes, self._calendar(started))
        if receipt.load_seconds > 0:
            loaded = {
                "ktcompile.kv.host.tokens": receipt.host_tokens,
                "ktcompile.kv.host.bytes": receipt.host_bytes,
                "ktcompile.kv.disk.tokens": receipt.disk_tokens,
                "ktcompile.kv.disk.bytes": receipt.disk_bytes,
            }
            self._part("kv_promote", span, started - receipt.load_seconds, loaded).end(self._calendar(started))

    def _part(self, name: str, of: Span, begin: float, attributes: dict[str, int] | None = None) -> Span:
        context = set_span_in_context(of)
        return self._tracer.start_span(name, context, attributes=attributes, start_time=self._calendar(begin))

    def _calendar(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


def _remember(contexts: dict[str, SpanContext], name: str, context: SpanContext) -> None:
    """Add one, and forget the oldest of too many."""
    contexts[name] = context
    if len(contexts) > _REMEMBERED:
        del contexts[next(iter(contexts))]
