"""Spans of requests, for OpenTelemetry."""

from __future__ import annotations

import time
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine
from helpers.servers import call, running, wait_for
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.server.options import ServerOptions


def test_a_request_is_a_span_of_the_callers_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    engine = FakeEngine(tokenizer=load_tokenizer(locate(None)), width=1, queue=0, before_step=lambda: time.sleep(0.005))
    body: dict[str, Any] = {"model": "fake", "prompt": "my secret", "max_tokens": 5, "seed": 3}
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(engine, ServerOptions(port=0, trace=True)) as server:
        begin = time.time_ns()
        assert call(server, "/v1/completions", body, headers={"traceparent": parent}).status == 200
        end = time.time_ns()
        spans = {span.name: span for span in exporter.get_finished_spans()}
        whole = spans["text_completion fake"]
        assert set(spans) == {"text_completion fake", "queue", "prefill", "decode"}
        assert whole.context and whole.parent
        assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
        assert f"{whole.parent.span_id:016x}" == parent.split("-")[2]
        edges = [edge for name in ("queue", "prefill", "decode") for edge in times(spans[name])]
        assert edges == sorted(edges)
        assert begin <= edges[0] and edges[-1] <= end + 10_000_000
        assert all(spans[name].parent.span_id == whole.context.span_id for name in ("queue", "prefill", "decode"))
        found = whole.attributes or {}
        assert found["gen_ai.request.seed"] == 3 and found["gen_ai.usage.output_tokens"] == 5
        assert found["gen_ai.response.finish_reasons"] == ("length",)
        assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())

        exporter.clear()
        assert call(server, "/v1/completions", {**body, "max_tokens": 500, "timeout": 0.05}).status == 504
        wait_for(lambda: len(exporter.get_finished_spans()) == 4)
        assert exporter.get_finished_spans()[-1].attributes["error.type"] == "timeout"

        exporter.clear()
        engine.width = 0
        assert call(server, "/v1/completions", body).status == 429
        (refused,) = exporter.get_finished_spans()
        assert refused.attributes and refused.attributes["error.type"] == "rate_limit_exceeded"


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time
