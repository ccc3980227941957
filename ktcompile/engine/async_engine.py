"""An engine in a thread of its own, and the requests of an event loop that it answers.

The thread steps while there is work and waits on a condition when there is none. What a step gave goes to the loop by
one call, and from there to the stream of each request. A stream holds so much that was not read yet and no more: the
request of a reader that is slower than that is aborted, and neither the engine nor another reader waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktcompile.engine.outputs import FinishReason
from ktcompile.engine.protocols import EngineLike, Observer
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.log import logger

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta, EngineStats

# Steps that fail one after the other before the engine is given up.
_FAILURES = 3


class Health(enum.Enum):
    """ready: takes requests. draining: ends what it has and takes no more. dead: it can do nothing any more."""

    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class UnavailableError(RuntimeError):
    """The engine takes no request: it is drained, closed or dead."""


class StepError(RuntimeError):
    """The step in which a request was computed failed, and the request ended with it."""


class SlowReaderError(RuntimeError):
    """A request was aborted since its deltas were not read."""


@dataclass(eq=False)
class Stream:
    """The deltas of one request, in order, for one reader. Belongs to the event loop."""

    request_id: str
    limit: int
    unfinished: int
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    deltas: deque[Delta] = field(default_factory=deque)
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more comes from the engine; deltas may still be unread."""
        return self.unfinished == 0 or self.error is not None


class AsyncEngine:
    """Runs an engine in a thread of its own.

    max_unread: deltas of an answer that wait for their reader before the request is aborted. observer: is told of
    each step. `start` begins, in the event loop that the requests come from; `close` ends.
    """

    def __init__(self, engine: EngineLike, *, max_unread: int = 1024, observer: Observer | None = None) -> None:
        self.engine = engine
        self._max_unread = max_unread
        self._observer = observer
        self._streams: dict[str, Stream] = {}
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._unfinished: dict[str, int] = {}  # answers of requests that the engine has; of its thread
        self._stats = engine.stats()
        self._closing = False
        self._health = Health.READY
        self._failures = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="ktcompile-engine", daemon=True)

    @property
    def health(self) -> Health:
        return self._health

    @property
    def num_streams(self) -> int:
        """Requests that have a reader."""
        return len(self._streams)

    @property
    def stats(self) -> EngineStats:
        """What `Engine.stats` said last."""
        return self._stats

    def start(self) -> None:
        """Start the thread. The running event loop is that of all requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[list[Delta], None]:
        """Yield what the engine adds to a request, each time all that was not read yet, until its last answer ends.

        Leaving the loop early, or being cancelled, aborts the request. deadline: by time.monotonic.
        cache_salt: as of `Engine.add`. Errors before the first delta are those of `Engine.add` and UnavailableError;
        later ones StepError and SlowReaderError.
        """
        if self._health is not Health.READY:
            raise UnavailableError(f"the engine is {self._health.value} and takes no request")
        if request_id in self._streams:
            raise ValueError(f"there is a request {request_id!r} already")
        stream = Stream(request_id, self._max_unread * params.n, params.n)
        self._streams[request_id] = stream
        self._idle.clear()
        try:
            await self._add(request_id, prompt_token_ids, params, prompt, deadline, cache_salt)
            while True:
                await stream.ready.wait()
                stream.ready.clear()
                deltas, error, ended = list(stream.deltas), stream.error, stream.ended
                stream.deltas.clear()
                if deltas:
                    yield deltas  # while the reader has them, more may come
                if error is not None:
                    raise error
                if ended:
                    return
        finally:
            self._forget(stream)

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no request any more and wait for those that there are. Return whether all ended within `timeout`
        seconds; the rest is aborted."""
        if self._health is Health.READY:
            self._health = Health.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except (TimeoutError, asyncio.TimeoutError):
            self._fail_all(UnavailableError("the engine is closed"))
            return False
        return True

    async def close(self) -> None:
        """Abort what there is, end the thread, and close the engine; a step that runs is finished first."""
        if self._health is Health.READY:
            self._health = Health.DRAINING
        self._fail_all(UnavailableError("the engine is closed"))
        with self._wake:
            self._closing = True
            self._wake.notify()
        loop = asyncio.get_running_loop()
        if self._thread.is_alive():
            await loop.run_in_executor(None, self._thread.join)
        await loop.run_in_executor(None, self.engine.close)

    async def _add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None,
        deadline: float | None,
        cache_salt: str,
    ) -> None:
        """Have the thread add a request, and raise what `Engine.add` raises."""
        assert self._loop is not None, "start was not called"
        done: asyncio.Future[None] = self._loop.create_future()
        arrival = time.monotonic()

        def add() -> None:
            try:
                if self._health is Health.DEAD:
                    raise UnavailableError("the engine is dead and takes no request")
                self.engine.add(
                    request_id, prompt_token_ids, params, prompt=prompt, deadline=deadline, cache_salt=cache_salt
                )
            except Exception as error:
                self._call_loop(_settle, done, error)
                return
            self._unfinished[request_id] = params.n
            if self._observer is not None:
                self._observer.added(request_id, len(prompt_token_ids), params, arrival)
            self._call_loop(_settle, done, None)

        self._submit(add)
        await done

    def _forget(self, stream: Stream) -> None:
        """Drop a stream, and abort its request if that goes on. An abort comes after its add, in any case."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            if not stream.ended or stream.error is not None:
                self._submit(lambda: self._abort(stream.request_id))
        if not self._streams:
            self._idle.set()

    def _fail_all(self, error: Exception) -> None:
        for stream in self._streams.values():
            _fail(stream, error)

    def _fail_named(self, names: Sequence[str], error: Exception) -> None:
        for name in names:
            if name in self._streams:
                _fail(self._streams[name], error)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """Hand the deltas of a step to their streams. Runs in the loop."""
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None or stream.ended:
                continue
            if len(stream.deltas) >= stream.limit:
                stream.deltas.clear()
                _fail(stream, SlowReaderError(f"{stream.limit} deltas were not read, so the request was aborted"))
                self._submit(lambda name=delta.request_id: self._abort(name))  # type: ignore[misc]
                continue
            stream.deltas.append(delta)
            if delta.finish_reason is not None:
                stream.unfinished -= 1
            stream.ready.set()

    # What follows runs in the thread of the engine.

    def _submit(self, command: Callable[[], None]) -> None:
        """Have the thread run a command before its next step. May be called by any thread."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            logger.exception("the thread of the engine failed")
            self._give_up(error)

    def _turn(self) -> bool:
        """Wait for work and do some. Return whether there may be more."""
        with self._wake:
            while not (self._commands or self._closing or self._may_step()):
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
            if self._closing and not commands:
                return False
        for command in commands:
            command()
        if self._may_step() and not self._closing:
            self._step()
        elif commands:
            self._stats = self.engine.stats()
        return True

    def _may_step(self) -> bool:
        return self._health is not Health.DEAD and self.engine.has_requests

    def _step(self) -> None:
        begin = time.monotonic()
        try:
            deltas = self.engine.step()
            self._stats = self.engine.stats()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._recover(error)
            return
        # The engine ends the requests of a step of the model that fails; all of them do where it cannot work any more.
        failed = bool(deltas) and all(delta.finish_reason == "error" for delta in deltas)
        self._failures = self._failures + 1 if failed else 0
        for delta in deltas:
            if delta.finish_reason is not None and delta.request_id in self._unfinished:
                self._unfinished[delta.request_id] -= 1
                if not self._unfinished[delta.request_id]:
                    del self._unfinished[delta.request_id]
        if self._observer is not None:
            self._observer.stepped(deltas, self._stats, self.engine.last_step, time.monotonic() - begin)
        if deltas:
            self._call_loop(self._deliver, deltas)
        if self._failures == _FAILURES:
            self._give_up(StepError("steps of the engine fail again and again"))

    def _recover(self, error: Exception) -> None:
        """End all requests after a step that failed; give up if that fails too, or steps do again and again."""
        self._failures += 1
        failed = StepError(f"a step of the engine failed: {type(error).__name__}")
        failed.__cause__ = error
        names = list(self._unfinished)
        try:
            for name in names:
                self.engine.abort(name)
                self._drop(name, "error")
            recovered = self._failures < _FAILURES
        except Exception:
            logger.exception("the requests of a step that failed could not be aborted")
            recovered = False
        if recovered:
            self._call_loop(self._fail_named, names, failed)
        else:
            self._give_up(failed)

    def _give_up(self, error: BaseException) -> None:
        logger.error("the engine cannot go on and takes no request any more")
        self._health = Health.DEAD
        self._call_loop(self._fail_all, error if isinstance(error, Exception) else StepError(repr(error)))

    def _abort(self, request_id: str) -> None:
        """Abort a request that the engine still has."""
        if request_id not in self._unfinished:
            return
        try:
            self.engine.abort(request_id)
        except Exception as error:
            logger.exception("a request could not be aborted")
            self._give_up(error)
        self._drop(request_id, "abort")

    def _drop(self, request_id: str, reason: FinishReason) -> None:
        del self._unfinished[request_id]
        if self._observer is not None:
            self._observer.dropped(request_id, reason)

    def _call_loop(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed; nobody is left to be told
            self._loop.call_soon_threadsafe(function, *args)


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # the request was cancelled
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _fail(stream: Stream, error: Exception) -> None:
    if not stream.ended:
        stream.error = error
        stream.ready.set()
