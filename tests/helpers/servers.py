"""Servers of a test, each in a thread of its own, at a port that the kernel chooses."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from ktcompile.engine.protocols import EngineLike
from ktcompile.server.app import create_app
from ktcompile.server.options import ServerOptions
from ktcompile.server.run import bind, in_thread, url_of
from ktcompile.server.service import Service


@dataclass
class Running:
    url: str
    port: int
    app: FastAPI
    service: Service


@contextmanager
def running(engine: EngineLike, options: ServerOptions | None = None) -> Iterator[Running]:
    """Give a server of an engine."""
    options = options or ServerOptions(port=0)
    app, bound = create_app(engine, options), bind(options)
    with in_thread(app, bound):
        yield Running(url_of(bound), bound.getsockname()[1], app, app.state.service)


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What a stream had, without its end."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def call(
    server: Running, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, method: str | None = None
) -> Reply:
    """Return what a server answers. body: bytes as they are, and anything else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        sent = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method or ("GET" if body is None else "POST"), path, content, sent)
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """AssertionError: something is not so within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
