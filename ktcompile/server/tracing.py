"""Spans of OpenTelemetry, with the attributes of its conventions for generative AI (extra `otel`).

A request is a span `chat MODEL` or `text_completion MODEL` of the caller's trace, with the parts `queue`, `prefill` and
`decode`. No prompt and no answer is in them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.server.metrics import Timing

_FAILED = ("error", "timeout", "abort")


class Tracing:
    """Makes the spans of requests. tracer: of some provider; None: of the one that the process has set."""

    def __init__(self, model: str, tracer: Tracer | None = None) -> None:
        self._model = model
        self._tracer = tracer or trace.get_tracer("ktcompile")
        self._spans: dict[str, Span] = {}
        # Spans have the time of the calendar, what happens in the engine that of time.monotonic.
        self._offset = time.time_ns() - time.monotonic_ns()

    def begin(
        self, request_id: str, path: str, headers: Mapping[str, str], params: SamplingParams, prompt_tokens: int
    ) -> None:
        """Begin the span of a request, within the trace that its headers name."""
        operation = "text_completion" if path == "/v1/completions" else "chat"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ktcompile",
            "gen_ai.request.model": self._model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.id": request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": prompt_tokens,
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        if params.seed is not None:
            attributes["gen_ai.request.seed"] = params.seed
        self._spans[request_id] = self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )

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
                part = self._tracer.start_span(name, set_span_in_context(span), start_time=self._calendar(begin))
                part.end(self._calendar(now if end is None else end))
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        span.set_attribute("gen_ai.usage.output_tokens", timing.tokens)
        if reason in _FAILED:
            span.set_attribute("error.type", reason)
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._calendar(now))

    def _calendar(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset
