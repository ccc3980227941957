"""Servers of a test, each in a thread of its own, at a port that the kernel chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from ktcompile.engine.async_engine import EngineLike
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
