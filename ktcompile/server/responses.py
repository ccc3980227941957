"""/v1/responses, for text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ktcompile.server.errors import json_response, of_exception
from ktcompile.server.protocol import InputMessage, ResponsesRequest
from ktcompile.server.sampling import of_responses
from ktcompile.server.service import Deltas, Service, api_errors
from ktcompile.server.sse import EventStream, event

_CUT = {"length": "max_output_tokens", "timeout": "timeout", "abort": "aborted"}


async def respond(body: ResponsesRequest, request: Request, service: Service) -> Response:
    """Return a response, whole or as its events."""
    service.check_model(body.model)
    with api_errors():
        params = of_responses(body, service.options, service.defaults)
    messages = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input)
    if body.instructions:
        messages.insert(0, InputMessage(role="system", content=body.instructions))
    prompt, ids = await service.prompts.of_messages(messages)
    response = _Response(body, service.name, len(ids), params.temperature, params.top_p)
    if body.stream:
        deltas = await service.open(request, prompt, ids, params, body.timeout)
        return EventStream(_events(response, deltas), service.options.write_timeout)
    (answer,) = await service.answer(request, prompt, ids, params, body.timeout)
    response.text, response.tokens, response.reason = answer.text, len(answer.token_ids), answer.finish_reason
    return json_response(response.value())


class _Response:
    """A response and what it has become."""

    def __init__(
        self, body: ResponsesRequest, model: str, prompt_tokens: int, temperature: float, top_p: float
    ) -> None:
        self._body = body
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._sampling = {"temperature": temperature, "top_p": top_p}
        self._id = f"resp_{uuid.uuid4().hex}"
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.text = ""
        self.tokens = 0
        self.reason: str | None = None
        self.error: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        if self.error is not None or self.reason == "error":
            return "failed"
        if self.reason is None:
            return "in_progress"
        return "incomplete" if self.reason in _CUT else "completed"

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def item(self) -> dict[str, Any]:
        content = [self.part()] if self.reason is not None else []
        status = self.status if self.status != "failed" else "incomplete"
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def value(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        ended = self.reason is not None
        usage = {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + self.tokens,
        }
        text = self._body.text.model_dump(by_alias=True, exclude_none=True) if self._body.text else {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": {"reason": _CUT[self.reason]} if self.reason in _CUT else None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "model": self._model,
            "output": [self.item()] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            **self._sampling,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": usage if ended else None,
            "metadata": self._body.metadata or {},
        }


async def _events(response: _Response, deltas: Deltas) -> AsyncGenerator[bytes, None]:
    number = 0

    def make(kind: str, **more: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **more}, kind)

    def opening() -> Iterator[bytes]:
        yield make("response.created", response=response.value())
        yield make("response.in_progress", response=response.value())
        yield make("response.output_item.added", output_index=0, item=response.item())
        yield make("response.content_part.added", **place, part=response.part())

    place = {"item_id": response.message_id, "output_index": 0, "content_index": 0}
    try:
        for piece in opening():
            yield piece
        async with aclosing(deltas):
            async for several in deltas:
                for delta in several:
                    response.tokens += len(delta.token_ids)
                    response.text += delta.text
                    response.reason = delta.finish_reason
                    if delta.text:
                        yield make("response.output_text.delta", **place, delta=delta.text, logprobs=[])
        yield make("response.output_text.done", **place, text=response.text, logprobs=[])
        yield make("response.content_part.done", **place, part=response.part())
        yield make("response.output_item.done", output_index=0, item=response.item())
    except Exception as error:
        response.error = {"code": "server_error", "message": str(of_exception(error))}
    yield make(f"response.{response.status}", response=response.value())
