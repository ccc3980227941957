"""A request to a server, timed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ktcompile.bench.serve.outcome import OK, Counting, Outcome, spread
from ktcompile.bench.serve.sse import Events

# A server closes a connection that is not used for some seconds, uvicorn after five: one that it may be closing is not
# used again.
_KEEP_ALIVE = 2.0
_LONGEST_DETAIL = 300


def make_session(api_key: str | None) -> aiohttp.ClientSession:
    """Return a session without a limit of connections. To be closed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    traces = aiohttp.TraceConfig()
    traces.on_request_chunk_sent.append(_note_sent)
    limit = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=limit, trace_configs=[traces])


class Client:
    """Sends requests to one address. origin: the run's begin, by `time.perf_counter`. timeout: seconds of a request."""

    def __init__(self, session: aiohttp.ClientSession, url: str, origin: float, timeout: float) -> None:
        self._session, self._url, self._origin = session, url, origin
        self._limit = aiohttp.ClientTimeout(total=timeout)

    async def send(self, index: int, path: str, body: bytes, planned: float | None = None) -> Outcome:
        """Send a request now, and return what came of it. planned: when it should have been, since the origin."""
        answer = _Answer(time.perf_counter())
        refused: tuple[str, str, float | None] | None = None
        try:
            async with self._session.post(
                self._url + path, data=body, timeout=self._limit, trace_request_ctx=answer
            ) as response:
                if response.status == 200:
                    while data := await response.content.readany():
                        answer.take(data, time.perf_counter())
                else:
                    words = short(await response.text(errors="replace"))
                    refused = str(response.status), words, _retry_after(response.headers)
        except asyncio.TimeoutError:
            answer.problem = ("timeout", f"no end after {self._limit.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            answer.problem = ("connection", short(str(error) or type(error).__name__))
        end = time.perf_counter() - self._origin
        sent = answer.sent - self._origin
        late = 0.0 if planned is None else sent - planned
        if refused:
            status, words, wait = refused
            return Outcome(index, sent, late, end, status, retry_after=wait, detail=words)
        return answer.outcome(index, sent, late, end)


async def _note_sent(session: aiohttp.ClientSession, context: Any, params: aiohttp.TraceRequestChunkSentParams) -> None:
    answer = context.trace_request_ctx
    if answer is not None:  # another request than a timed one
        answer.sent = time.perf_counter()


def short(text: str) -> str:
    """Return the start of a server's words, on one line."""
    return " ".join(text.split())[:_LONGEST_DETAIL]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return float(headers["Retry-After"])
    except (KeyError, ValueError):  # a date counts as none
        return None


class _Answer:
    """An answer as it comes. sent: when its request was, by `time.perf_counter`: when its content was given to the
    system, a connection being there."""

    def __init__(self, sent: float) -> None:
        self.sent = sent
        self.problem: tuple[str, str] | None = None
        self._events = Events()
        self._chunks: list[_Chunk] = []
        self._usage: dict[str, Any] = {}
        self._finish: str | None = None
        self._done = False

    def take(self, data: bytes, now: float) -> None:
        """Take what came now."""
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
                continue
            try:
                record = json.loads(event)
                if record.get("error"):
                    self.problem = ("stream", short(json.dumps(record["error"])))
                else:
                    self._take_chunk(record, now - self.sent)
            except (ValueError, AttributeError, LookupError, TypeError):
                self.problem = ("stream", short(f"this is no chunk of a completion: {event.decode(errors='replace')}"))

    def _take_chunk(self, record: dict[str, Any], after: float) -> None:
        choices, usage = record.get("choices"), record.get("usage")
        so_far = None
        if usage:
            self._usage, so_far = usage, int(usage["completion_tokens"])
        if choices:
            choice = choices[0]
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice.get("delta", choice)
            has_content = any(delta.get(name) for name in _CONTENT)
            ids, probabilities = choice.get("token_ids"), choice.get("logprobs")
            self._chunks.append(_Chunk(after, has_content, so_far, ids and len(ids), _count(probabilities)))

    def outcome(self, index: int, sent: float, late: float, end: float) -> Outcome:
        counting, chunks = _counted(self._chunks, self._usage.get("completion_tokens"))
        status, detail = self.problem or (OK, "")
        if status == OK and not (self._done or self._finish):
            status, detail = "cut off", "the stream ended without [DONE] or a finish_reason"
        if status == OK and not chunks:
            status, detail = "no tokens", "the answer has none"
        prompt_tokens = self._usage.get("prompt_tokens")
        return Outcome(index, sent, late, end, status, prompt_tokens, chunks, counting, self._finish, detail=detail)


# Where a chunk's text may be; the last is a field of completions, the others are of chats.
_CONTENT = ("content", "reasoning_content", "reasoning", "tool_calls", "text")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """time: since the request was sent. so_far: tokens of the answer by the server's usage. ids, probabilities: tokens
    of the chunk by what it has of them; None where it has none."""

    time: float
    has_content: bool
    so_far: int | None
    ids: int | None
    probabilities: int | None


def _counted(chunks: Sequence[_Chunk], total: int | None) -> tuple[Counting, tuple[tuple[float, int], ...]]:
    """Return how tokens are counted, and time and tokens of each chunk that has some. total: by the last usage."""
    with_content = [c for c in chunks if c.has_content]
    if not with_content:
        return "chunks", ()
    counting: Counting
    if all(c.so_far is not None for c in with_content):
        counting, counts, before = "usage", [], 0
        for chunk in chunks:
            counts.append((chunk.so_far or before) - before)
            before = chunk.so_far or before
    elif all(c.ids for c in with_content):
        counting, counts = "token_ids", [c.ids or 0 for c in chunks]
    elif all(c.probabilities for c in with_content):
        counting, counts = "logprobs", [c.probabilities or 0 for c in chunks]
    else:
        spreads = total is not None and total > len(with_content)
        counting, chunks = "spread" if spreads else "chunks", with_content
        counts = spread(total or 0, len(chunks))
    return counting, tuple((c.time, n) for c, n in zip(chunks, counts, strict=True) if n > 0)


def _count(probabilities: dict[str, Any] | None) -> int | None:
    """Return the tokens of a chunk's log-probabilities: completions have `tokens`, chats `content`."""
    if not probabilities:
        return None
    return len(probabilities.get("tokens") or probabilities.get("content") or ()) or None
