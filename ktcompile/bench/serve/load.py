"""Sends a workload to a server as its arrivals say."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ktcompile.bench.serve.arrivals import ClosedLoop
from ktcompile.bench.serve.client import Client, make_session
from ktcompile.bench.serve.dialect import Dialect
from ktcompile.bench.serve.outcome import Outcome
from ktcompile.bench.serve.workload import Request, Workload

# The loop's timers come up to a millisecond late, so that the rest is waited for in turns of the loop.
_TIMER = 2e-3
_PRIORITY = 15

Body = Callable[[Request], bytes]
Send = Callable[[Request, bytes, float | None], Coroutine[Any, Any, None]]


async def run(
    url: str,
    model: str,
    dialect: Dialect,
    workload: Workload,
    *,
    api_key: str | None,
    timeout: float,
    keep: Callable[[Outcome], None],
) -> None:
    """Send all requests, and give `keep` each outcome as it comes: if this is interrupted, it has those until then.

    timeout: seconds after which a request is given up.
    """
    async with make_session(api_key) as session:
        origin = time.perf_counter()
        client = Client(session, url, origin, timeout)

        async def send(request: Request, body: bytes, planned: float | None) -> None:
            keep(await client.send(request.index, dialect.path, body, planned))

        def body(request: Request) -> bytes:
            prompt = workload.prompt(request) if dialect.ids else workload.text(request)
            return dialect.body(model, prompt, request.output_tokens)

        with _undisturbed():
            if isinstance(workload.arrivals, ClosedLoop):
                await _closed(workload.requests, workload.arrivals.concurrency, body, send)
            else:
                await _open(workload.requests, origin, body, send)


async def _closed(requests: Sequence[Request], concurrency: int, body: Body, send: Send) -> None:
    waiting = iter(requests)

    async def one_after_the_other() -> None:
        for request in waiting:
            await send(request, body(request), None)

    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))


async def _open(requests: Sequence[Request], origin: float, body: Body, send: Send) -> None:
    tasks: list[asyncio.Task[None]] = []
    for request in requests:
        assert request.arrival is not None
        ready = body(request)  # while there is time
        await until(origin + request.arrival)
        tasks.append(asyncio.create_task(send(request, ready, request.arrival)))
    await asyncio.gather(*tasks)


async def until(moment: float) -> None:
    """Return at a moment of `time.perf_counter`, or at once if it is over."""
    while (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(max(0.0, left - _TIMER))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let this thread run as soon as something comes.

    The garbage collector leaves alone what is there already, torch included, which takes it tens of milliseconds. Where
    the system lets us, we go before the server, which may have all cores busy: it would be our wait that is measured.
    """
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    gc.freeze()
    try:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, priority - _PRIORITY)
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, priority)
        gc.unfreeze()
