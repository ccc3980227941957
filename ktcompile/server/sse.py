"""Answers that come in pieces, and clients that leave before they are complete."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientLeft(Exception):  # noqa: N818
    """There is nobody to answer any more."""


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one event of a stream."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work gives; it is cancelled if the client leaves. ClientLeft: it has."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        await _cancel(task, leaving)


class EventStream(Response):
    """Sends events as they come, until the client leaves or takes nothing for write_timeout seconds."""

    def __init__(self, events: AsyncGenerator[bytes, None], write_timeout: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
        self._events = events
        self._write_timeout = write_timeout
        self._begin: float | None = None  # of the event that is being sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            while not (sending.done() or leaving.done() or self._sleeps()):
                await asyncio.wait(
                    {sending, leaving}, timeout=self._write_timeout / 2, return_when=asyncio.FIRST_COMPLETED
                )
            if sending.done():
                with contextlib.suppress(OSError):  # the client has gone
                    sending.result()
        finally:
            await _cancel(sending, leaving)
            await self._events.aclose()

    def _sleeps(self) -> bool:
        """Whether the client has not taken an event for too long."""
        return self._begin is not None and time.monotonic() - self._begin > self._write_timeout

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._events:
            self._begin = time.monotonic()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self._begin = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
