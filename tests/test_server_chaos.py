"""Clients of all kinds at once, more than the server can take: afterwards nothing is left of any."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter
from typing import Any

from helpers.fake_engine import FakeEngine, fake_tokens
from helpers.servers import Running, call, running, wait_for

from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.server.options import ServerOptions

SECONDS = 4.0


def test_nothing_is_left_of_a_crowd() -> None:
    engine = FakeEngine(
        tokenizer=load_tokenizer(locate(None)),
        max_model_len=1 << 20,
        width=4,
        queue=6,
        before_step=lambda: time.sleep(0.002),
    )
    options = ServerOptions(port=0, max_body_bytes=4096, max_unread=64, write_timeout=0.5, body_timeout=0.5)
    seen: Counter[object] = Counter()
    with running(engine, options) as server:
        assert call(server, "/health").status == 200
        before = tasks(server)
        end = time.monotonic() + SECONDS
        clients = [threading.Thread(target=client, args=(server, seed, end, seen)) for seed in range(20)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
            assert not thread.is_alive()
        wait_for(lambda: server.service.engine.num_streams == 0 and not engine.requests)
        wait_for(lambda: tasks(server) <= before)
        assert not server.service.engine._unfinished and not server.service.metrics._requests
        assert call(server, "/v1/completions", {"model": "fake", "prompt": [1]}).status == 200
    assert not {status for status in seen if isinstance(status, int)} - {200, 400, 408, 413, 429}, seen
    assert all(seen[kind] for kind in (200, 400, 413, 429, "left", "slept")), seen


def client(server: Running, seed: int, end: float, seen: Counter[object]) -> None:
    """Ask again and again, each time in another way."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        prompt, count = [rng.randrange(4096)], rng.randrange(1, 60)
        body = {"model": "fake", "prompt": prompt, "max_tokens": count}
        kind = rng.choice(("whole", "whole", "stream", "leave", "sleep", "wrong", "large"))
        if kind in ("leave", "sleep"):
            unfinished(server, {**body, "max_tokens": 1 << 16, "stream": True}, 0.0 if kind == "leave" else 1.5)
            seen["left" if kind == "leave" else "slept"] += 1
            continue
        sent: Any = {**body, "stream": kind == "stream"}
        if kind in ("wrong", "large"):
            sent = b"{" if kind == "wrong" else b" " * 5000
        reply = call(server, "/v1/completions", sent)
        seen[reply.status] += 1
        text = "".join(f"{token} " for token in fake_tokens(prompt, count))
        if reply.status == 429:
            assert int(reply.headers["Retry-After"]) >= 1
        elif kind == "whole":
            assert reply.json["choices"][0]["text"] == text
        elif kind == "stream" and "error" not in reply.events[-1]:
            assert "".join(event["choices"][0]["text"] for event in reply.events) == text


def unfinished(server: Running, body: dict[str, Any], seconds: float) -> None:
    """Ask, read nothing for some seconds, and leave."""
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        time.sleep(seconds)


def tasks(server: Running) -> int:
    """Return how many tasks the server's loop has."""
    loop = server.service.engine._loop
    assert loop is not None

    async def count() -> int:
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), loop).result(10)
