"""The server's edges: what it refuses, whom it does not wait for, and what it says of itself."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine, fake_tokens
from helpers.servers import Running, call, running, wait_for
from prometheus_client.parser import text_string_to_metric_families

from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.runtime.activity import Activity
from ktcompile.runtime.metrics import ExpertMetrics, LayerMetrics
from ktcompile.runtime.prometheus import exposition
from ktcompile.server.app import create_app
from ktcompile.server.options import ServerOptions
from ktcompile.server.run import bind, in_thread, url_of

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "fake", "prompt": [1, 2, 3]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(locate(None))


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    with running(FakeEngine(tokenizer=tokenizer)) as result:
        yield result


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/v1/chat/completions", {**CHAT, "audio": {}}, 400, "audio"),
        ("/v1/chat/completions", {**CHAT, "store": True}, 422, "store"),
        ("/v1/chat/completions", {**CHAT, "functions": []}, 400, "functions"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 422, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "robot", "content": ""}]}, 422, "messages.0.role"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
        (
            "/v1/chat/completions",
            {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            400,
            "tool_choice",
        ),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, "response_format"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tools": "x"}}, 400, "chat_template_kwargs"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "n": 17}, 400, "n"),
        ("/v1/completions", {**TEXT, "best_of": 2}, 400, "best_of"),
        ("/v1/completions", {**TEXT, "echo": True, "logprobs": 1}, 400, "echo"),
        ("/v1/completions", {**TEXT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {**TEXT, "prompt": [99999]}, 400, "prompt"),
        ("/v1/completions", {**TEXT, "seed": 1 << 70}, 422, "seed"),
        ("/v1/completions", {**TEXT, "stream_options": {"chunks": 1}}, 400, "stream_options.chunks"),
        ("/v1/responses", {"model": "fake", "input": "x", "tools": []}, 400, "tools"),
        ("/v1/responses", {"model": "fake", "input": "x", "previous_response_id": "r"}, 400, "previous_response_id"),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "model"),
    ],
)
def test_what_is_not_served_is_named(server: Running, path: str, body: Any, status: int, named: str) -> None:
    reply = call(server, path, body)
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is not None and error["param"].startswith(named)
    assert named.split(".")[0] in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"x"', b"\xff\xfe", b'{"model": "\\ud800", "prompt": "x"}'])
def test_what_is_no_body_is_refused(server: Running, body: bytes) -> None:
    reply = call(server, "/v1/completions", body, method="POST")
    assert reply.status in (400, 404, 422)
    assert reply.json["error"]["message"]


def test_null_is_left_out(server: Running) -> None:
    assert call(server, "/v1/completions", {**TEXT, "suffix": None, "stop": None, "max_tokens": None}).status == 200


def test_other_places_and_methods_are_not_there(server: Running) -> None:
    assert call(server, "/v1/nothing").json["error"]["type"] == "not_found_error"
    assert call(server, "/v1/completions").status == 405


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(engine: FakeEngine) -> None:
    with running(engine, ServerOptions(port=0, max_body_bytes=1000)) as server:
        assert call(server, "/v1/completions", b" " * 1001).status == 413
        with socket.create_connection(("127.0.0.1", server.port)) as client:  # says no length
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                client.sendall(b"200\r\n" + b" " * 512 + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413")
        assert call(server, "/v1/completions", TEXT).status == 200


def test_a_body_that_does_not_come_is_not_waited_for(engine: FakeEngine) -> None:
    with (
        running(engine, ServerOptions(port=0, body_timeout=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_the_key_is_asked_for_everywhere_but_at_the_door(engine: FakeEngine) -> None:
    with running(engine, ServerOptions(port=0, api_key="secret")) as server:
        for path in ("/v1/models", "/metrics", "/status", "/docs", "/openapi.json"):
            assert call(server, path).status == 401
            assert (
                call(server, path, headers={"Authorization": "Bearer wrong"}).json["error"]["code"] == "invalid_api_key"
            )
            assert call(server, path, headers={"Authorization": "Basic secret"}).status == 401
            assert call(server, path, headers={"Authorization": "Bearer s\u00e9cret"}).status == 401
            assert call(server, path, headers={"Authorization": "Bearer secret"}).status == 200
        assert call(server, "/health").status == call(server, "/ready").status == 200


def test_a_request_keeps_its_id(server: Running) -> None:
    assert call(server, "/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    given = call(server, "/nowhere", headers={"X-Request-Id": "a b\tc"}).headers["X-Request-Id"]
    assert len(given) == 32


def stream_of(server: Running, body: dict[str, Any]) -> socket.socket:
    """Ask for a stream, and read its beginning alone."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    client.sendall(head.encode() + b"\r\n\r\n" + content)
    assert client.recv(100).startswith(b"HTTP/1.1 200")
    return client


def test_a_slow_reader_loses_its_request_and_holds_nobody(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=1 << 30, before_step=lambda: time.sleep(0.0002))
    with (
        running(engine, ServerOptions(port=0, max_unread=256, write_timeout=1.0)) as server,
        stream_of(server, {**TEXT, "max_tokens": 1 << 20}),
    ):
        assert call(server, "/v1/completions", {**TEXT, "max_tokens": 50}).status == 200
        wait_for(lambda: len(engine.aborted) == 1)
        assert call(server, "/v1/completions", TEXT).status == 200
        wait_for(lambda: server.service.engine.num_streams == 0)
        assert not engine.requests


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(tokenizer: Any, stream: bool) -> None:
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=1 << 30, before_step=lambda: time.sleep(0.002))
    with running(engine) as server:
        content = json.dumps({**TEXT, "max_tokens": 1 << 20, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            wait_for(lambda: bool(engine.requests))
            if stream:
                client.recv(10)
        wait_for(lambda: len(engine.aborted) == 1)
        assert not engine.requests and server.service.engine.num_streams == 0


def test_twice_what_fits_gets_429_and_when_to_try_again(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer=tokenizer, width=2, queue=6, before_step=lambda: time.sleep(0.005))
    replies: list[Any] = []

    def ask(i: int) -> None:
        prompt = [i + 1]
        reply = call(server, "/v1/completions", {**TEXT, "prompt": prompt, "max_tokens": 20})
        replies.append(reply)
        if reply.status == 200:
            assert reply.json["choices"][0]["text"] == "".join(f"{token} " for token in fake_tokens(prompt, 20))

    with running(engine) as server:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [reply for reply in replies if reply.status != 200]
        assert len(refused) == 8
        assert {reply.status for reply in refused} == {429}
        assert all(int(reply.headers["Retry-After"]) >= 1 for reply in refused)
        assert refused[0].json["error"]["type"] == "rate_limit_error"
        assert not engine.requests


def test_time_that_is_over_is_504_before_the_first_byte_and_a_reason_after(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer=tokenizer, before_step=lambda: time.sleep(0.02))
    with running(engine) as server:
        reply = call(server, "/v1/completions", {**TEXT, "max_tokens": 1000, "timeout": 0.1})
        assert (reply.status, reply.json["error"]["code"]) == (504, "timeout")
        reply = call(server, "/v1/completions", {**TEXT, "max_tokens": 1000, "timeout": 0.1, "stream": True})
        assert reply.events[-1]["choices"][0]["finish_reason"] == "timeout"


def test_steps_that_fail_are_said_and_a_dead_engine_is_not_healthy(tokenizer: Any) -> None:
    def before_step() -> None:
        if engine.steps in broken:
            raise RuntimeError("a secret of the server")

    broken = {3}
    engine = FakeEngine(tokenizer=tokenizer, before_step=before_step)
    with running(engine) as server:
        events = call(server, "/v1/completions", {**TEXT, "stream": True}).events
        assert events[-1]["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(events)
        assert call(server, "/v1/completions", TEXT).status == 200
        broken |= set(range(1000))
        assert [call(server, "/v1/completions", TEXT).status for _ in range(4)] == [500, 500, 500, 503]
        assert call(server, "/health").status == call(server, "/ready").status == 503


def test_a_server_that_drains_takes_nothing_and_ends_what_runs(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer=tokenizer, before_step=lambda: time.sleep(0.01))
    with running(engine) as server, stream_of(server, {**TEXT, "max_tokens": 60}) as client:
        import asyncio

        loop = server.service.engine._loop
        assert loop is not None
        drained = asyncio.run_coroutine_threadsafe(server.service.engine.drain(30), loop)
        wait_for(lambda: call(server, "/ready").status == 503)
        reply = call(server, "/v1/completions", TEXT)
        assert reply.status == 503 and reply.headers["Retry-After"]
        assert call(server, "/health").status == 200
        assert drained.result(30)
        text = b""
        while b"[DONE]" not in text:
            text += client.recv(10_000)
        assert b'"finish_reason":"length"' in text


def test_prompts_are_not_in_the_log_unless_asked_for(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = {"model": "fake", "prompt": "my secret", "max_tokens": 2}
    with running(engine) as server:
        call(server, "/v1/completions", secret)
        call(server, "/v1/completions", {**secret, "temperature": -1})
        call(server, "/v1/completions", {**secret, "wrong": "my secret"})
        call(server, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "my secret"}]})
    assert "path=/v1/completions status=200" in caplog.text
    assert "secret" not in caplog.text
    with running(engine, ServerOptions(port=0, log_prompts=True)) as server:
        call(server, "/v1/completions", secret)
    assert "my secret" in caplog.text


def test_metrics_count_what_was_served(engine: FakeEngine) -> None:
    with running(engine) as server:
        for _ in range(3):
            call(server, "/v1/completions", {**TEXT, "max_tokens": 5, "n": 2})
        call(server, "/v1/completions", {**TEXT, "prompt": []})
        text = call(server, "/metrics").body.decode()
    values = {
        (sample.name, *(v for k, v in sample.labels.items() if k not in ("model_name", "le"))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["model_name"] == "fake"
    }
    assert values["vllm:generation_tokens_total",] == 30
    assert values["vllm:prompt_tokens_total",] == 9
    assert values["vllm:request_success_total", "length"] == 3
    assert values["vllm:num_requests_running",] == values["vllm:num_requests_waiting",] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert values[f"vllm:{name}_seconds_count",] == 3
    assert values["vllm:inter_token_latency_seconds_count",] == 3 * 2 * 4
    assert values["vllm:admission_rejections_total", "invalid_value"] == 1


def test_experts_on_a_device_are_in_the_same_registry(engine: FakeEngine) -> None:
    layer = LayerMetrics((1, 2), (5, 3, 0, 2), Activity(cpu_rows=6, device_rows=4))
    experts = ExpertMetrics("a device", 1000, 600, 7, (layer,))
    app, bound = create_app(engine, expert_metrics=lambda: experts), bind(ServerOptions(port=0))
    with in_thread(app, bound):
        server = Running(url_of(bound), bound.getsockname()[1], app, app.state.service)
        text = call(server, "/metrics").body.decode()
    own = {line for line in exposition(experts).splitlines() if "ktcompile_expert" in line}
    found = {line.removesuffix(".0") for line in text.splitlines() if "ktcompile_expert" in line}
    assert {line for line in own if line.startswith("#")} <= found
    assert {
        parts[0]: float(parts[1]) for line in own if not line.startswith("#") if (parts := line.rsplit(" ", 1))
    } == {parts[0]: float(parts[1]) for line in found if not line.startswith("#") if (parts := line.rsplit(" ", 1))}
    assert "vllm:num_requests_running" in text and text.count("# TYPE") == len(set(re.findall(r"# TYPE \S+", text)))


def test_the_page_is_open_and_its_figures_are_those_of_the_server(engine: FakeEngine) -> None:
    with running(engine, ServerOptions(port=0, api_key="secret")) as server:
        key = {"Authorization": "Bearer secret"}
        page = call(server, "/")
        assert page.status == 200 and page.headers["Content-Type"].startswith("text/html")
        assert b'fetch("status"' in page.body and call(server, "/status").status == 401
        call(server, "/v1/completions", {**TEXT, "max_tokens": 5}, headers=key)
        call(server, "/v1/completions", {**TEXT, "prompt": []}, headers=key)
        found = call(server, "/status", headers=key).json
    assert (found["state"], found["model"]) == ("ready", "fake")
    assert (found["requests_finished"], found["requests_rejected"], found["requests_running"]) == (1, 1, 0)
    assert found["ttft"]["p50"] > 0 and found["itl"]["p99"] > 0 and found["expert_counts"] is None


def test_the_prefix_of_metrics_can_be_ours(engine: FakeEngine) -> None:
    with running(engine, ServerOptions(port=0, metrics_prefix="ktcompile_")) as server:
        text = call(server, "/metrics").body
    assert b"ktcompile_num_requests_running" in text and b"vllm" not in text


def test_texts_become_tokens_and_texts_again(server: Running) -> None:
    tokens = call(server, "/tokenize", {"prompt": "def f(x):"}).json
    assert tokens["count"] == len(tokens["tokens"]) > 1
    assert call(server, "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "def f(x):"}
    chat = call(server, "/tokenize", {"messages": [{"role": "user", "content": "def f(x):"}]}).json
    assert chat["tokens"] == tokens["tokens"]
    assert call(server, "/tokenize", {}).status == 400
    assert call(server, "/detokenize", {"tokens": [4096]}).status == 400
