"""What is answered before a model is ready, and by whom afterwards."""

from __future__ import annotations

import http.client
import json
import socket
import time

import pytest
from helpers.fake_engine import FakeEngine

from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.server.app import create_app
from ktcompile.server.options import ServerOptions
from ktcompile.server.run import bind, in_thread
from ktcompile.server.starting import Starting


def ask(port: int, method: str, path: str) -> tuple[int, str | None, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, b"{}" if method == "POST" else None)
    reply = connection.getresponse()
    return reply.status, reply.getheader("Retry-After"), json.loads(reply.read())


def test_a_server_that_starts_says_so_and_then_another_one_answers_there() -> None:
    starting, options = Starting(), ServerOptions(port=0)
    bound = bind(options)
    port = bound.getsockname()[1]
    with in_thread(starting.app, bound.dup()):
        for phase in ("loading the model", "tracing the model"):
            starting.phase = phase
            for path in ("/ready", "/health"):
                assert ask(port, "GET", path) == (503, None, {"status": "starting", "phase": phase})
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/"), ("DELETE", "/v1/models/x")):
            status, after, body = ask(port, method, path)
            assert (status, after) == (503, "5")
            assert "tracing the model" in str(body["error"])
    # Who comes between the two waits and is answered.
    with socket.create_connection(("127.0.0.1", port)) as early:
        early.sendall(b"GET /ready HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        with in_thread(create_app(FakeEngine(tokenizer=load_tokenizer(locate(None))), options), bound):
            early.settimeout(20)
            assert early.recv(1024).startswith(b"HTTP/1.1 200")
            assert ask(port, "GET", "/ready")[::2] == (200, {"status": "ready"})
    with pytest.raises(ConnectionRefusedError):
        while True:
            ask(port, "GET", "/ready")
            time.sleep(0.01)
