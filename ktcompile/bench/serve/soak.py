"""A server at twice what it can do, among clients that misbehave: does it stay itself?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ktcompile.bench.serve import abuse, load
from ktcompile.bench.serve.arrivals import OpenLoop
from ktcompile.bench.serve.client import Client, make_session
from ktcompile.bench.serve.gauges import Gauges, read_gauges
from ktcompile.bench.serve.outcome import Outcome
from ktcompile.bench.serve.probe import Target
from ktcompile.bench.serve.workload import Workload

# Of the requests; the others are ordinary.
SHARES = {"leaves": 0.08, "slow": 0.04, "oversize": 0.04, "bad JSON": 0.04}
ORDINARY = "ordinary"
# Tokens of a prompt that is too long where the server does not say what it takes.
_OVERSIZE = 1 << 18
_SLOW_SECONDS = 20.0
_SLOW_ANSWER = 4  # times as long as others, so that buffers do not take all of it
_SAMPLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SoakEnd:
    """What came of a request. kind: what it was. begin: seconds from the start. status: of ordinary ones as in
    `Outcome`."""

    kind: str
    begin: float
    status: str


@dataclass(frozen=True, slots=True)
class Soaked:
    """A soak. rate: requests per second that were sent. seconds: while they were. ordinary: outcomes of ordinary
    requests. ends: of all requests. unended: requests that had not ended when all should have. memory: seconds and
    resident bytes. idle: what the server says of itself when all is over."""

    rate: float
    seconds: float
    ordinary: tuple[Outcome, ...]
    ends: tuple[SoakEnd, ...]
    unended: int
    memory: tuple[tuple[float, int], ...]
    idle: Gauges | None
    answers_after: bool


async def soak(
    target: Target,
    workload: Workload,
    *,
    rate: float,
    seconds: float,
    timeout: float,
    api_key: str | None,
    resident_bytes: Callable[[], int] | None,
    told: Callable[[str], None],
) -> Soaked:
    """Send requests at a rate for some seconds, then wait until all have ended, for `timeout` seconds each at most.

    workload: whose lengths are taken in turn, with prompts of their own. resident_bytes: of the server, where it is
    ours to look at. told: gets a line now and then."""
    rng = np.random.default_rng((workload.seed, 3))
    kinds = [ORDINARY, *SHARES]
    shares = [1 - sum(SHARES.values()), *SHARES.values()]
    outcomes: list[Outcome] = []
    ends: list[SoakEnd] = []
    memory: list[tuple[float, int]] = []
    async with make_session(api_key) as session:
        origin = time.perf_counter()
        client = Client(session, target.url, origin, timeout)
        address = target.url + target.dialect.path
        headers = dict(session.headers)

        def body(index: int, oversize: bool = False, longer: int = 1) -> bytes:
            request = workload.requests[index % len(workload.requests)]
            size = (target.max_model_len or _OVERSIZE) + 1 if oversize else request.input_tokens
            own = replace(request, index=index, input_tokens=size, blocks=(), text=None if oversize else request.text)
            prompt = workload.prompt(own) if target.dialect.ids else workload.text(own)
            return target.dialect.body(target.model, prompt, longer * request.output_tokens)

        async def one(index: int, kind: str, planned: float) -> None:
            if kind in (ORDINARY, "oversize", "bad JSON"):
                content = body(index, oversize=kind == "oversize")
                if kind == "bad JSON":
                    bad = abuse.bad_bodies(content)
                    content = bad[index % len(bad)]
                outcome = await client.send(index, target.dialect.path, content, planned)
                status = outcome.status
                if kind == ORDINARY:
                    outcomes.append(outcome)
            elif kind == "leaves":
                status = await abuse.leave(session, address, body(index), index % 7)
            else:
                status = await abuse.read_slowly(address, headers, body(index, longer=_SLOW_ANSWER), _SLOW_SECONDS)
            ends.append(SoakEnd(kind, planned, status))

        async def watch() -> None:
            while True:
                if resident_bytes is not None:
                    memory.append((time.perf_counter() - origin, resident_bytes()))
                told(f"{len(ends)} of {len(tasks)} requests have ended")
                await asyncio.sleep(_SAMPLE_SECONDS)

        tasks: list[asyncio.Task[None]] = []
        watcher = asyncio.create_task(watch())
        times = OpenLoop(rate).times(rng, max(1, round(rate * seconds)))
        for index, planned in enumerate(times):
            await load.until(origin + planned)
            tasks.append(asyncio.create_task(one(index, str(rng.choice(kinds, p=shares)), planned)))
        _, pending = await asyncio.wait(tasks, timeout=timeout + _SLOW_SECONDS)
        for task in pending:
            task.cancel()
        watcher.cancel()
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()  # what went wrong here is a mistake of ours
        await asyncio.sleep(_SAMPLE_SECONDS)
        after = await client.send(len(times), target.dialect.path, body(len(times)))
        idle = await read_gauges(session, target.url)
    ordered = tuple(sorted(outcomes, key=lambda o: o.index))
    return Soaked(
        rate=rate,
        seconds=times[-1],
        ordinary=ordered,
        ends=tuple(ends),
        unended=len(pending),
        memory=tuple(memory),
        idle=idle,
        answers_after=bool(after.chunks),
    )
