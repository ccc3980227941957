"""A server as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette

from ktcompile.log import logger
from ktcompile.server.options import ServerOptions
from ktcompile.server.service import Service


def bind(options: ServerOptions) -> socket.socket:
    """Return a socket at the address of the options; nobody can connect yet. OSError: the address is in use."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    result = socket.socket(family, socket.SOCK_STREAM)
    try:
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        result.bind((options.host, options.port))
    except OSError:
        result.close()
        raise
    return result


def url_of(bound: socket.socket) -> str:
    """Return where a server that has this socket is found."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def in_thread(app: Starlette, bound: socket.socket) -> Iterator[None]:
    """Serve in a thread of this process for the time of a block. The socket is closed then."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([bound],), name="ktcompile-server", daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
        yield
    finally:
        server.should_exit = True
        thread.join(30)


def serve(app: FastAPI, options: ServerOptions, bound: socket.socket, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, and let what runs end; a second signal aborts it, and the server ends after the
    step that is computed. started: is called when requests are taken."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        limit_concurrency=options.max_connections,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    _Server(config, app.state.service, options.drain_timeout, started).run([bound])


class _Server(uvicorn.Server):
    """Keeps answering while it drains: requests that come then are told so, and those that run end."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_timeout: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout = drain_timeout
        self._started = started
        self._draining: asyncio.Task[None] | None = None
        self._hurrying: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            super().handle_exit(sig, frame)
            return
        if self._draining is not None:
            self.config.timeout_graceful_shutdown = 1  # for readers that do not take their last event
            self._hurrying = self._loop.create_task(self._hurry())
            self._loop.call_soon_threadsafe(lambda: None)
            return
        self._draining = self._loop.create_task(self._drain())
        self._loop.call_soon_threadsafe(lambda: None)  # the loop may be asleep

    async def _drain(self) -> None:
        running = self._service.engine.num_streams
        logger.info("draining: %d requests run, no more are taken", running)
        print(f"ktc: ending {running} requests; once more to stop now", file=sys.stderr, flush=True)
        complete = await self._service.engine.drain(self._drain_timeout)
        logger.info("drained" if complete else "the time to drain is over; the rest was aborted")
        self.should_exit = True

    async def _hurry(self) -> None:
        await self._service.engine.drain(0)
        self.should_exit = True
