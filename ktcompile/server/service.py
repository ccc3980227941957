"""What the endpoints share: one engine, its prompts, its limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request

from ktcompile import __version__
from ktcompile.engine.async_engine import AsyncEngine, Health, StepError, UnavailableError
from ktcompile.engine.outputs import FinishReason, Logprobs
from ktcompile.engine.protocols import EngineLike
from ktcompile.engine.sampling_params import SamplingParams, Thought
from ktcompile.engine.structured import Grammar
from ktcompile.log import logger
from ktcompile.machine import machine
from ktcompile.ops.threads import native_threads
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError
from ktcompile.server.errors import ApiError, of_exception
from ktcompile.server.metrics import ServerMetrics
from ktcompile.server.options import ServerOptions
from ktcompile.server.prompts import Prompts
from ktcompile.server.reasoning import CLOSE, OPEN, ReasoningParser, parser_for
from ktcompile.server.sse import while_connected
from ktcompile.server.status import Latency, ModelFacts, Status
from ktcompile.server.usage import Usage

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta
    from ktcompile.engine.receipt import Receipt
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
    """One answer, whole. cached: tokens of the prompt that were not computed. receipt: of these. pieces: text and
    number of tokens of what came at a time."""

    index: int
    request_id: str = ""
    cached: int = 0
    receipt: Receipt | None = None
    pieces: list[tuple[str, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True, slots=True)
class Ask:
    """What an endpoint asks of the engine, for a client's request. text: the prompt's, where it has one. timeout:
    seconds that the client gives. cache_salt: of those with whom keys and values are shared; None: with all who have
    none. tool_call_ids: calls whose results the prompt has."""

    request: Request
    ids: Sequence[int]
    params: SamplingParams
    text: str | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    tool_call_ids: tuple[str, ...] = ()


class Service:
    """Answers prompts for the endpoints.

    expert_metrics: where experts are, if any are on a device. defaults: of sampling parameters that a request leaves
    out, by name; the model's own. facts: of the model, for the status page.
    """

    def __init__(
        self,
        engine: EngineLike,
        options: ServerOptions,
        *,
        defaults: dict[str, Any] | None = None,
        expert_metrics: Callable[[], ExpertMetrics | None] = lambda: None,
        facts: Callable[[], ModelFacts] = ModelFacts,
    ) -> None:
        self.options = options
        self.name = options.served_model_name or served_name(engine.model_name)
        self.created = int(time.time())
        self._began = time.monotonic()
        self._facts = facts
        self.defaults = defaults or {}
        self._tracing: Tracing | None = None
        watchers: dict[str, Any] = {}
        if options.trace:
            from ktcompile.server.tracing import Tracing

            self._tracing = tracing = Tracing(self.name, options.prices)
            engine.watch_tiers(tracing.happened)
            watchers = {"ended": tracing.ended, "evicted": lambda blocks: tracing.happened("device_evicted", blocks)}
        self.metrics = ServerMetrics(
            self.name, options.metrics_prefix, expert_metrics, tier_counters=engine.tier_counters, **watchers
        )
        self.prompts = Prompts(engine.tokenizer)
        self.engine = AsyncEngine(engine, max_unread=options.max_unread, observer=self.metrics)
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size

    def status(self) -> Status:
        """Return what the page at / shows."""
        stats, metrics, facts = self.engine.stats, self.metrics, self._facts()
        ttft, itl = metrics.latencies()
        return Status(
            model=self.name,
            version=__version__,
            state=_STATES[self.engine.health],
            isa=machine().isa,
            threads=native_threads().count,
            weight_format=facts.weight_format,
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
            block_size=facts.block_size,
            max_model_len=self.max_model_len,
            ttft=Latency.of(ttft),
            itl=Latency.of(itl),
            expert_counts=facts.expert_counts or None,
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

    async def open(self, ask: Ask) -> Deltas:
        """Return what comes of a prompt, once the first of it is there. ApiError: nothing does. ClientLeft."""
        name, stream = await self._begin(ask)
        with self._traced(name), api_errors():
            first = await while_connected(ask.request, anext(stream))
        for delta in first:
            if delta.finish_reason in _FAILED and not delta.text:
                await stream.aclose()
                raise _failure(delta.finish_reason)
        return _with_first(first, stream)

    async def answer(self, ask: Ask) -> list[Answer]:
        """Return all answers to a prompt, whole. ApiError: there are none. ClientLeft."""
        name, stream = await self._begin(ask)
        with self._traced(name), api_errors():
            return await while_connected(ask.request, _collect(stream, ask.params.n))

    def usage(self, prompt_tokens: int) -> Usage:
        """Return the record of what a request uses, as it begins."""
        return Usage(prompt_tokens, prices=self.options.prices)

    def behind_thought(self, prompt: str, params: SamplingParams) -> SamplingParams:
        """Return parameters of an answer to a chat's prompt, whose form, if one is given, is that of its content."""
        form, parser = params.structured_outputs, self.reasoning(prompt)
        if form is None or parser is None:
            return params
        return replace(params, structured_outputs=replace(form, thought=Thought(OPEN, CLOSE, parser.inside)))

    def reasoning(self, prompt: str) -> ReasoningParser | None:
        """Return what tells thought from content in an answer to a chat's prompt."""
        return parser_for(self.options.reasoning_parser, prompt, has_tags=self.prompts.has_think_tags)

    def called(self, request_id: str, call_ids: Sequence[str]) -> None:
        """Note which calls an answer of a request asks for; who brings their results is linked to it."""
        if self._tracing is not None:
            self._tracing.called(request_id, call_ids)

    async def _begin(self, ask: Ask) -> tuple[str, Deltas]:
        """Return the engine's name of a request, and what comes of it once it is read."""
        ids, params = ask.ids, ask.params
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
            logger.info("prompt %r", ask.text if ask.text is not None else list(ids))
        limits = [limit for limit in (ask.timeout, self.options.request_timeout) if limit is not None]
        deadline = time.monotonic() + min(limits) if limits else None
        name = uuid.uuid4().hex
        if self._tracing is not None:
            self._tracing.begin(name, ask)
        return name, self.engine.generate(
            name, ids, params, prompt=ask.text, deadline=deadline, cache_salt=ask.cache_salt or ""
        )

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
                answer.request_id, answer.cached = delta.request_id, delta.num_cached_tokens
                answer.receipt = delta.receipt
                answer.pieces.append((delta.text, len(delta.token_ids)))
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
