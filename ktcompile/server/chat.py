"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from ktcompile.engine.outputs import Logprob, Logprobs
from ktcompile.server import tools
from ktcompile.server.errors import json_response, of_exception
from ktcompile.server.protocol import ChatRequest
from ktcompile.server.sampling import of_chat
from ktcompile.server.service import Answer, Deltas, Service, api_errors, finite, usage
from ktcompile.server.sse import DONE, EventStream, event

if TYPE_CHECKING:
    from ktcompile.engine.sampling_params import SamplingParams


async def respond(body: ChatRequest, request: Request, service: Service) -> Response:
    """Return the answer to a chat."""
    service.check_model(body.model)
    with api_errors():
        params = of_chat(body, service.options, tools.demanded(body), service.defaults)
    if body.tools and not body.parallel_tool_calls and body.tool_choice in (None, "auto"):
        params = replace(params, stop=(*params.stop_texts, tools.CLOSE))
    prompt, ids = await service.prompts.of_chat(body)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if body.stream:
        deltas = await service.open(request, prompt, ids, params, body.timeout)
        events = _events(body, params, {**head, "object": "chat.completion.chunk"}, deltas, len(ids))
        return EventStream(events, service.options.write_timeout)
    answers = await service.answer(request, prompt, ids, params, body.timeout)
    return json_response(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(answer, body, params) for answer in answers],
            "usage": usage(len(ids), sum(len(answer.token_ids) for answer in answers)),
        }
    )


def _choice(answer: Answer, body: ChatRequest, params: SamplingParams) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    parser, reason = tools.parser_for(body), answer.finish_reason
    if parser is not None:
        pieces = [*parser.add(answer.text), *parser.end()]
        message["content"] = "".join(piece for piece in pieces if isinstance(piece, str)) or None
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, tools.CallDelta):
                if piece.id is not None:
                    function = {"name": piece.name, "arguments": ""}
                    calls.append({"id": piece.id, "type": "function", "function": function})
                calls[piece.index]["function"]["arguments"] += piece.arguments
        if calls:
            message["tool_calls"] = calls
    return {
        "index": answer.index,
        "message": message,
        "logprobs": None
        if params.logprobs is None
        else {"content": _logprobs(answer.token_ids, answer.logprobs, params)},
        "finish_reason": _reason(reason, parser),
        "stop_reason": answer.stop_reason,
    }


async def _events(
    body: ChatRequest, params: SamplingParams, head: dict[str, Any], deltas: Deltas, prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. What fails once it has begun is an event too."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    none_yet = {"usage": None} if with_usage else {}
    parsers = [tools.parser_for(body) for _ in range(params.n)]
    generated = 0

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**head, "choices": [choice], **none_yet})

    try:
        for index in range(params.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(deltas):
            async for several in deltas:
                for delta in several:
                    generated += len(delta.token_ids)
                    parser, ended = parsers[delta.index], delta.finish_reason is not None
                    logprobs = {}
                    if params.logprobs is not None and delta.token_ids:
                        logprobs = {"logprobs": {"content": _logprobs(delta.token_ids, delta.logprobs or (), params)}}
                    for part in _parts(parser, delta.text, ended):
                        yield chunk(delta.index, part, **logprobs)
                        logprobs = {}
                    if logprobs:
                        yield chunk(delta.index, {}, **logprobs)
                    if ended:
                        reason = _reason(delta.finish_reason, parser)
                        yield chunk(delta.index, {}, finish_reason=reason, stop_reason=delta.stop_reason)
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(prompt_tokens, generated)})
    except Exception as error:
        yield event(of_exception(error).body)
    yield DONE


def _parts(parser: tools.ToolParser | None, text: str, ended: bool) -> Iterator[dict[str, Any]]:
    """Yield what is new of a message."""
    if parser is None:
        if text:
            yield {"content": text}
        return
    for piece in (*parser.add(text), *(parser.end() if ended else ())):
        if isinstance(piece, str):
            yield {"content": piece}
            continue
        function = {"arguments": piece.arguments}
        if piece.id is None:
            yield {"tool_calls": [{"index": piece.index, "function": function}]}
        else:
            call = {"id": piece.id, "type": "function", "function": {"name": piece.name, **function}}
            yield {"tool_calls": [{"index": piece.index, **call}]}


def _reason(reason: str | None, parser: tools.ToolParser | None) -> str | None:
    return "tool_calls" if reason == "stop" and parser is not None and parser.calls else reason


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[Logprobs], params: SamplingParams) -> list[dict[str, Any]]:
    """Return OpenAI's records: of each token, and of the likeliest ones in its place."""
    result = []
    for token, found in zip(token_ids, logprobs, strict=True):
        # The token that was chosen is behind the likeliest ones where it is none of them.
        top = sorted(found.values(), key=lambda other: other.rank)[: params.logprobs]
        result.append({**_logprob(found[token]), "top_logprobs": [_logprob(other) for other in top]})
    return result


def _logprob(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token or ""
    return {"token": text, "logprob": finite(found.logprob), "bytes": list(text.encode())}
