"""/v1/responses, for text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ktcompile.server.errors import json_response, of_exception
from ktcompile.server.protocol import InputMessage, ResponsesRequest
from ktcompile.server.reasoning import Kind, ReasoningParser
from ktcompile.server.sampling import of_responses
from ktcompile.server.service import Ask, Deltas, Service, api_errors
from ktcompile.server.sse import EventStream, event
from ktcompile.server.usage import Usage

_CUT = {"length": "max_output_tokens", "timeout": "timeout", "abort": "aborted"}
# Of a part of each kind: the type of its item, the beginning of its id, the type of the part, the name of its events.
_NAMES: dict[Kind, tuple[str, str, str, str]] = {
    "reasoning_content": ("reasoning", "rs", "reasoning_text", "response.reasoning_text"),
    "content": ("message", "msg", "output_text", "response.output_text"),
}


async def respond(body: ResponsesRequest, request: Request, service: Service) -> Response:
    """Return a response, whole or as its events."""
    service.check_model(body.model)
    with api_errors():
        params = of_responses(body, service.options, service.defaults)
    messages = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input)
    if body.instructions:
        messages.insert(0, InputMessage(role="system", content=body.instructions))
    prompt, ids = await service.prompts.of_messages(messages)
    params = service.behind_thought(prompt, params)
    sampling = {"temperature": params.temperature, "top_p": params.top_p}
    response = _Response(body, service.name, service.usage(len(ids)), service.reasoning(prompt), sampling)
    ask = Ask(request, ids, params, prompt, body.timeout, body.cache_salt)
    if body.stream:
        deltas = await service.open(ask)
        return EventStream(_events(response, deltas), service.options.write_timeout)
    (answer,) = await service.answer(ask)
    response.usage.cached = answer.cached
    for text, tokens in answer.pieces:
        for _ in response.add(text, tokens):
            pass
    for _ in response.end(answer.finish_reason):
        pass
    return json_response(response.value())


@dataclass
class _Item:
    """One of the outputs: what is thought, or the message. ended: nothing comes to it any more."""

    kind: Kind
    place: int
    id: str = field(init=False)
    text: str = ""
    ended: bool = False

    def __post_init__(self) -> None:
        self.id = f"{_NAMES[self.kind][1]}_{uuid.uuid4().hex}"

    def part(self) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.kind == "content" else {}
        return {"type": _NAMES[self.kind][2], "text": self.text, **more}

    def value(self, status: str) -> dict[str, Any]:
        more: dict[str, Any] = {"role": "assistant"} if self.kind == "content" else {"summary": []}
        content = [self.part()] if self.ended else []
        return {"id": self.id, "type": _NAMES[self.kind][0], **more, "status": status, "content": content}


_Event = tuple[str, dict[str, Any]]


class _Response:
    """A response and what it has become. Its events are names and fields."""

    def __init__(
        self,
        body: ResponsesRequest,
        model: str,
        usage: Usage,
        reasoning: ReasoningParser | None,
        sampling: dict[str, float],
    ) -> None:
        self._body = body
        self._model = model
        self.usage = usage
        self._reasoning = reasoning
        self._sampling = sampling
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items: list[_Item] = []
        self._reason: str | None = None
        self.error: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        if self.error is not None or self._reason == "error":
            return "failed"
        if self._reason is None:
            return "in_progress"
        return "incomplete" if self._reason in _CUT else "completed"

    def add(self, text: str, tokens: int) -> Iterator[_Event]:
        """Take some more text of so many tokens, and yield the events of that."""
        self.usage.completion += tokens
        if self._reasoning is None:
            yield from self._piece("content", text)
            return
        before = self._reasoning.inside
        for kind, piece in self._reasoning.add(text):
            yield from self._piece(kind, piece)
        if before or self._reasoning.inside:
            self.usage.reasoning += tokens

    def end(self, reason: str | None) -> Iterator[_Event]:
        """Note why the answer ended, and yield the last events of its items. There is a message, if an empty one."""
        for kind, piece in self._reasoning.end() if self._reasoning is not None else ():
            yield from self._piece(kind, piece)
        self._reason = reason
        if not self._items:
            yield from self._begin("content")
        yield from self._end_item(self.status if self.status != "failed" else "incomplete")

    def value(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        ended = self._reason is not None
        last = self.status if self.status != "failed" else "incomplete"
        status = {item.place: "completed" for item in self._items[:-1]}
        text = self._body.text.model_dump(by_alias=True, exclude_none=True) if self._body.text else {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": {"reason": _CUT[self._reason]} if self._reason in _CUT else None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "model": self._model,
            "output": [item.value(status.get(item.place, last)) for item in self._items] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            **self._sampling,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": self.usage.for_responses() if ended else None,
            "metadata": self._body.metadata or {},
        }

    def _piece(self, kind: Kind, text: str) -> Iterator[_Event]:
        if not text:
            return
        if not self._items or self._items[-1].kind != kind:
            if self._items:
                yield from self._end_item("completed")
            yield from self._begin(kind)
        item = self._items[-1]
        item.text += text
        more: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
        yield f"{_NAMES[kind][3]}.delta", {**_place(item), "delta": text, **more}

    def _begin(self, kind: Kind) -> Iterator[_Event]:
        item = _Item(kind, len(self._items))
        self._items.append(item)
        yield "response.output_item.added", {"output_index": item.place, "item": item.value("in_progress")}
        yield "response.content_part.added", {**_place(item), "part": item.part()}

    def _end_item(self, status: str) -> Iterator[_Event]:
        item = self._items[-1]
        item.ended = True
        more: dict[str, Any] = {"logprobs": []} if item.kind == "content" else {}
        yield f"{_NAMES[item.kind][3]}.done", {**_place(item), "text": item.text, **more}
        yield "response.content_part.done", {**_place(item), "part": item.part()}
        yield "response.output_item.done", {"output_index": item.place, "item": item.value(status)}


def _place(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.place, "content_index": 0}


async def _events(response: _Response, deltas: Deltas) -> AsyncGenerator[bytes, None]:
    number = 0

    def make(kind: str, fields: dict[str, Any]) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

    try:
        for name in ("response.created", "response.in_progress"):
            yield make(name, {"response": response.value()})
        async with aclosing(deltas):
            async for several in deltas:
                for delta in several:
                    response.usage.cached = delta.num_cached_tokens
                    for name, fields in response.add(delta.text, len(delta.token_ids)):
                        yield make(name, fields)
                    if delta.finish_reason is not None:
                        for name, fields in response.end(delta.finish_reason):
                            yield make(name, fields)
    except Exception as error:
        response.error = {"code": "server_error", "message": str(of_exception(error))}
    yield make(f"response.{response.status}", {"response": response.value()})
