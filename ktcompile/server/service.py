"""What the endpoints share: one engine, its prompts, its limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request

from ktcompile import __version__
from ktcompile.engine.async_engine import AsyncEngine, Health, StepError, UnavailableError
from ktcompile.engine.outputs import FinishReason, Logprobs
from ktcompile.engine.protocols import EngineLike
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.structured import Grammar
from ktcompile.log import logger
from ktcompile.machine import machine
from ktcompile.ops.threads import native_threads
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError
from ktcompile.server.errors import ApiError, of_exception
from ktcompile.server.metrics import ServerMetrics
from ktcompile.server.options import ServerOptions
from ktcompile.server.prompts import Prompts
from ktcompile.server.sse import while_connected
from ktcompile.server.status import Latency, Status

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta
    from ktcompile.runtime.metrics import ExpertMetrics
    from ktcompile.server.tracing import Tracing

Deltas = AsyncGenerator[list["Delta"], None]

_STATES: dict[Health, Literal["ready", "draining", "failed"]] = {
    Health.READY: "ready",
    Health.DRAINING: "draining",
    Health.DEAD: "failed",
}
# Why an answer that is sent whole is none.
_FAILED: dict[str, tuple[int, str, str]] = {
    "timeout": (504, "the request's time was over before its answer was complete", "timeout"),
    "error": (500, "the model failed; the server's log has the reason", "internal_error"),
    "abort": (503, "the request was aborted", "aborted"),
}


@dataclass(slots=True)
class Answer:
    """One answer, whole."""

    index: int
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Service:
    """Answers prompts for the endpoints.

    expert_metrics: where experts are, if any are on a device. defaults: of sampling parameters that a request leaves
    out, by name; the model's own. expert_counts: tokens that each expert of each layer was given.
    """

    def __init__(
        self,
        engine: EngineLike,
        options: ServerOptions,
        *,
        defaults: dict[str, Any] | None = None,
        expert_metrics: Callable[[], ExpertMetrics | None] = lambda: None,
        expert_counts: Callable[[], Sequence[Sequence[int]]] = tuple,
    ) -> None:
        self.options = options
        self.name = options.served_model_name or served_name(engine.model_name)
        self.created = int(time.time())
        self._began = time.monotonic()
        self._expert_counts = expert_counts
        self.defaults = defaults or {}
        self._tracing: Tracing | None = None
        if options.trace:
            from ktcompile.server.tracing import Tracing

            self._tracing = Tracing(self.name)
        ended = None if self._tracing is None else self._tracing.ended
        self.metrics = ServerMetrics(self.name, options.metrics_prefix, expert_metrics, ended)
        self.prompts = Prompts(engine.tokenizer)
        self.engine = AsyncEngine(engine, max_unread=options.max_unread, observer=self.metrics)
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size

    def status(self) -> Status:
        """Return what the page at / shows."""
        stats, metrics = self.engine.stats, self.metrics
        ttft, itl = metrics.latencies()
        return Status(
            model=self.name,
            version=__version__,
            state=_STATES[self.engine.health],
            isa=machine().isa,
            threads=native_threads().count,
            uptime_seconds=time.monotonic() - self._began,
            requests_running=stats.num_running,
            requests_waiting=stats.num_waiting,
            requests_finished=metrics.num_finished,
            requests_rejected=metrics.num_rejected,
            preemptions=stats.num_preemptions,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generated_tokens,
            kv_usage=stats.kv_usage,
            kv_blocks=stats.num_blocks,
            max_model_len=self.max_model_len,
            ttft=Latency.of(ttft),
            itl=Latency.of(itl),
            expert_counts=self._expert_counts() or None,
        )

    async def close(self) -> None:
        await self.engine.close()
        self.prompts.close()

    def check_model(self, name: str | None) -> None:
        """ApiError: the model that is asked for is not here."""
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model {name!r}; this server has {self.name!r}", param="model", code="model_not_found"
            )

    async def open(
        self, request: Request, prompt: str | None, ids: Sequence[int], params: SamplingParams, timeout: float | None
    ) -> Deltas:
        """Return what comes of a prompt, once the first of it is there. ApiError: nothing does. ClientLeft."""
        name, stream = await self._begin(request, prompt, ids, params, timeout)
        with self._traced(name), api_errors():
            first = await while_connected(request, anext(stream))
        for delta in first:
            if delta.finish_reason in _FAILED and not delta.text:
                await stream.aclose()
                raise _failure(delta.finish_reason)
        return _with_first(first, stream)

    async def answer(
        self, request: Request, prompt: str | None, ids: Sequence[int], params: SamplingParams, timeout: float | None
    ) -> list[Answer]:
        """Return all answers to a prompt, whole. ApiError: there are none. ClientLeft."""
        name, stream = await self._begin(request, prompt, ids, params, timeout)
        with self._traced(name), api_errors():
            return await while_connected(request, _collect(stream, params.n))

    async def _begin(
        self, request: Request, prompt: str | None, ids: Sequence[int], params: SamplingParams, timeout: float | None
    ) -> tuple[str, Deltas]:
        """Return the engine's name of a request, and what comes of it once it is read."""
        if not ids:
            raise ApiError(400, "the prompt has no tokens", code="invalid_value")
        asked = len(ids) + (params.max_tokens or 1)
        if asked > self.max_model_len:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens and the answer may have {params.max_tokens or 'any number'}; "
                f"the model has {self.max_model_len} positions",
                code="context_length_exceeded",
            )
        structured = params.structured_outputs
        if structured is not None:  # compiled here, the engine copies it
            tokenizer = self.engine.engine.tokenizer
            with api_errors():
                await self.prompts.run(lambda: Grammar(structured, tokenizer))
        if self.options.log_prompts:
            logger.info("prompt %r", prompt if prompt is not None else list(ids))
        limits = [limit for limit in (timeout, self.options.request_timeout) if limit is not None]
        deadline = time.monotonic() + min(limits) if limits else None
        name = uuid.uuid4().hex
        if self._tracing is not None:
            self._tracing.begin(name, request.url.path, request.headers, params, len(ids))
        return name, self.engine.generate(name, ids, params, prompt=prompt, deadline=deadline)

    @contextlib.contextmanager
    def _traced(self, name: str) -> Iterator[None]:
        """End the span of a request that comes to nothing before the engine has it."""
        try:
            yield
        except ApiError as error:
            if self._tracing is not None:
                self._tracing.refused(name, error.code or str(error.status))
            raise


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Make of what engine and parameters find wrong what is answered."""
    try:
        yield
    except (ValueError, RequestTooLongError, QueueFullError, UnavailableError, StepError) as error:
        raise of_exception(error) from error


def served_name(model: str) -> str:
    """Return the name of a model for clients: of a folder its own name, else the hub's id."""
    return Path(model).name if Path(model).is_dir() else model


def finite(logprob: float) -> float:
    """Return a log-probability as JSON can have it; that of 0 is OpenAI's -9999."""
    return max(logprob, -9999.0)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Return OpenAI's record of tokens. No prompt is cached yet, and no reasoning is told apart."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def gather_or_cancel(works: Sequence[Any]) -> list[Any]:
    """Return what all of some coroutines give; where one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(stream: Deltas, n: int) -> list[Answer]:
    answers = [Answer(index) for index in range(n)]
    async with contextlib.aclosing(stream):
        async for deltas in stream:
            for delta in deltas:
                answer = answers[delta.index]
                answer.pieces.append(delta.text)
                answer.token_ids += delta.token_ids
                answer.logprobs += delta.logprobs or []
                if delta.finish_reason is not None:
                    answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
                if delta.finish_reason in _FAILED:
                    raise _failure(delta.finish_reason)
    return answers


async def _with_first(first: list[Delta], stream: Deltas) -> Deltas:
    async with contextlib.aclosing(stream):
        yield first
        async for deltas in stream:
            yield deltas


def _failure(reason: str) -> ApiError:
    status, message, code = _FAILED[reason]
    return ApiError(status, message, code=code)
