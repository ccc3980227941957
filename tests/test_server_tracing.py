"""Spans of requests, for OpenTelemetry."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import engine_of, memory_of, push_out, tiny
from helpers.fake_engine import FakeEngine
from helpers.servers import call, running, wait_for
from helpers.text_model import build_model
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from ktcompile.cache.rates import Rates
from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.server.options import ServerOptions


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What has the spans of servers that are made now."""
    result = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(result))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    return result


def test_a_request_is_a_span_of_the_callers_trace(exporter: InMemorySpanExporter) -> None:
    engine = FakeEngine(tokenizer=load_tokenizer(locate(None)), width=1, queue=0, before_step=lambda: time.sleep(0.005))
    body: dict[str, Any] = {"model": "fake", "prompt": "my secret", "max_tokens": 5, "seed": 3}
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(engine, ServerOptions(port=0, trace=True)) as server:
        begin = time.time_ns()
        assert call(server, "/v1/completions", body, headers={"traceparent": parent}).status == 200
        end = time.time_ns()
        spans = {span.name: span for span in exporter.get_finished_spans()}
        whole = spans["text_completion fake"]
        assert set(spans) == {"text_completion fake", "queue", "prefill", "prefill_chunk", "decode"}
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
        assert "ktcompile.usage.cost" not in found
        assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())

        exporter.clear()
        assert call(server, "/v1/completions", {**body, "max_tokens": 500, "timeout": 0.05}).status == 504
        wait_for(lambda: len(exporter.get_finished_spans()) == 5)
        assert exporter.get_finished_spans()[-1].attributes["error.type"] == "timeout"

        exporter.clear()
        engine.width = 0
        assert call(server, "/v1/completions", body).status == 429
        (refused,) = exporter.get_finished_spans()
        assert refused.attributes and refused.attributes["error.type"] == "rate_limit_exceeded"


def test_chunks_of_a_prompt_are_parts_of_its_prefill(exporter: InMemorySpanExporter) -> None:
    engine = engine_of(tiny("qwen3_moe"), eager=True, max_num_batched_tokens=32, max_num_seqs=4)
    with running(engine, ServerOptions(port=0, trace=True)) as server:
        body = {"model": engine.model_name, "prompt": list(range(1, 76)), "max_tokens": 3}
        assert call(server, "/v1/completions", body).status == 200
        wait_for(lambda: len(exporter.get_finished_spans()) == 7)
    spans = exporter.get_finished_spans()
    (prefill,) = [span for span in spans if span.name == "prefill"]
    chunks = [span for span in spans if span.name == "prefill_chunk"]
    places = [(s.attributes["ktcompile.chunk.begin"], s.attributes["ktcompile.chunk.end"]) for s in chunks]
    assert places == [(0, 32), (32, 64), (64, 75)]
    assert all(span.parent.span_id == prefill.context.span_id for span in chunks)
    edges = [edge for span in chunks for edge in times(span)]
    assert edges == sorted(edges) and (edges[0], edges[-1]) == times(prefill)


def test_who_brings_the_result_of_a_call_is_linked_to_who_made_it(exporter: InMemorySpanExporter) -> None:
    made = ['<tool_call>{"name": "f", "arguments": {}}', "</tool_call>"]
    engine = FakeEngine(tokenizer=load_tokenizer(locate(None)), script=made)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    with running(engine, ServerOptions(port=0, trace=True)) as server:
        for stream in (False, True):
            exporter.clear()
            reply = call(server, "/v1/chat/completions", {**body, "stream": stream})
            if stream:
                deltas = [choice["delta"] for event in reply.events for choice in event["choices"]]
                (name,) = [c["id"] for d in deltas for c in d.get("tool_calls", ()) if "id" in c]
            else:
                (name,) = [c["id"] for c in reply.json["choices"][0]["message"]["tool_calls"]]
            results = [{"role": "tool", "tool_call_id": id_, "content": "1"} for id_ in (name, "call_unknown")]
            more = {**body, "messages": [*body["messages"], *results]}
            assert call(server, "/v1/chat/completions", more).status == 200
            wait_for(lambda: len([s for s in exporter.get_finished_spans() if s.name == "chat fake"]) == 2)
            first, second = [span for span in exporter.get_finished_spans() if span.name == "chat fake"]
            assert first.links == ()
            (link,) = second.links
            assert link.context == first.context and link.attributes == {"gen_ai.tool.call.id": name}


def test_each_move_of_the_prefix_cache_is_a_span_or_an_event(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hits and promotions are of their request, the rest of none; counters say the same."""
    monkeypatch.setattr(Rates, "worth_loading", lambda self, tiers, first, recompute: len(tiers))
    size = memory_of(engine_of(build_model(positions=256), eager=True), 8)
    few = {"kv_host_memory": 12 * size, "kv_disk_path": tmp_path / "kv", "kv_disk_size": 15 * size}
    engine = engine_of(build_model(positions=256), eager=True, kv_device_memory=32 * size, **few)
    assert engine._tiers is not None
    tiers, host = engine._tiers, engine._tiers._host

    def moved() -> Counter[str]:
        """Return how many blocks all spans of no request tell of, by name."""
        result: Counter[str] = Counter()
        for span in exporter.get_finished_spans():
            if span.name.startswith("kv_tier_"):
                assert span.parent is None
                assert span.name.endswith("verify_failed") == (span.status.status_code is StatusCode.ERROR)
                result[span.name.removeprefix("kv_tier_")] += span.attributes["ktcompile.kv.blocks"]
        return result

    with running(engine, ServerOptions(port=0, trace=True)) as server:

        def ask(seed: int) -> dict[str, int]:
            """Send a prompt of ten whole blocks, and return the tokens that were hits, by tier."""
            prompt, before = [3 + (seed + i) % 90 for i in range(81)], len(exporter.get_finished_spans())
            assert call(server, "/v1/completions", {"model": "model", "prompt": prompt, "max_tokens": 1}).status == 200
            wait_for(lambda: any(s.name == "text_completion model" for s in exporter.get_finished_spans()[before:]))
            assert tiers.settle(30)
            wait_for(lambda: engine.stats().num_free_blocks == 32)
            call(server, "/metrics")
            spans = exporter.get_finished_spans()[before:]
            (whole,) = [span for span in spans if span.name == "text_completion model"]
            hits = {e.attributes["ktcompile.kv.tier"]: e.attributes["ktcompile.kv.tokens"] for e in whole.events}
            loads = [span for span in spans if span.name == "kv_promote"]
            assert len(loads) <= 1 and (loads or not {"host", "disk"} & hits.keys())
            for load in loads:  # one that failed has no tokens
                assert load.parent.span_id == whole.context.span_id
                assert times(whole)[0] <= times(load)[0] < times(load)[1] <= times(whole)[1]
                for tier in ("host", "disk"):
                    assert load.attributes[f"ktcompile.kv.{tier}.tokens"] == hits.get(tier, 0)
            return hits

        assert ask(0) == {} and moved() == {"demoted": 10}
        assert ask(0) == {"device": 80}
        push_out(engine)
        assert ask(0) == {"host": 80} and moved() == {"demoted": 10, "disk_stored": 10, "device_evicted": 10}
        # The third block is damaged in the host, and is on disk.
        push_out(engine)
        slot = next(slot for slot in host._tree.nodes() if slot.position == 16)
        host._memory(slot)[0] ^= 1
        assert ask(0) == {"host": 16, "disk": 64} and moved()["host_verify_failed"] == 1
        for seed in (20, 20, 40, 40):
            push_out(engine)
            ask(seed)
        push_out(engine)
        for slot in host._tree.nodes():
            host.remove(slot.key)
        for record in (tmp_path / "kv").glob("*.ktkv"):
            record.write_bytes(record.read_bytes()[:-1] + b"?")
        ask(40)
    counted = {**engine.tier_counters(), "device_evicted": engine.stats().prefix_cache_evictions}
    every = {"demoted", "disk_stored", "device_evicted", "host_evicted", "disk_evicted", "disk_quarantined"}
    every |= {"host_verify_failed", "disk_verify_failed"}
    assert moved() == {name: counted[name] for name in every} and min(moved().values()) > 0


def test_what_a_request_costs_is_said_where_prices_are_known(exporter: InMemorySpanExporter) -> None:
    engine = FakeEngine(tokenizer=load_tokenizer(locate(None)))
    body: dict[str, Any] = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5}
    with running(engine, ServerOptions(port=0, trace=True, prompt_price=2.0, completion_price=10.0)) as server:
        cost = pytest.approx((3 * 2 + 5 * 10) / 1e6)
        assert call(server, "/v1/completions", body).json["usage"]["cost"] == cost
        wait_for(lambda: "text_completion fake" in [span.name for span in exporter.get_finished_spans()])
        (span,) = [span for span in exporter.get_finished_spans() if span.name == "text_completion fake"]
        assert span.attributes["ktcompile.usage.cost"] == cost
        streamed = call(
            server, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
        ).events
        assert streamed[-1]["usage"]["cost"] == cost
        assert json.loads(call(server, "/v1/responses", {"model": "fake", "input": "x"}).body)["usage"]["cost"] > 0
    with running(engine) as server:
        assert "cost" not in call(server, "/v1/completions", body).json["usage"]
    with pytest.raises(ValueError, match="cached_price"):
        ServerOptions(cached_price=-1.0)


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time
