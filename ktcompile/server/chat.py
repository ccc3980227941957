"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from ktcompile.engine.outputs import Logprob, Logprobs
from ktcompile.server import tools
from ktcompile.server.errors import json_response, of_exception
from ktcompile.server.message import MessageReader
from ktcompile.server.protocol import ChatRequest, StreamOptions
from ktcompile.server.sampling import of_chat
from ktcompile.server.service import Answer, Ask, Deltas, Service, api_errors, finite
from ktcompile.server.sse import DONE, EventStream, event
from ktcompile.server.usage import Usage

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
    params = service.behind_thought(prompt, params)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    results = tuple(message.tool_call_id for message in body.messages if message.tool_call_id is not None)
    ask = Ask(request, ids, params, prompt, body.timeout, body.cache_salt, results)
    readers = [MessageReader(body, service.reasoning(prompt)) for _ in range(params.n)]
    usage = service.usage(len(ids))
    if body.stream:
        deltas = await service.open(ask)
        events = _events(body, params, {**head, "object": "chat.completion.chunk"}, deltas, readers, usage, service)
        return EventStream(events, service.options.write_timeout)
    answers = await service.answer(ask)
    choices = [_choice(answer, reader, params) for answer, reader in zip(answers, readers, strict=True)]
    service.called(answers[0].request_id, [name for reader in readers for name in reader.call_ids])
    usage.cached = answers[0].cached
    usage.receipt = answers[0].receipt if service.options.cache_receipts else None
    usage.completion = sum(len(answer.token_ids) for answer in answers)
    usage.reasoning = sum(reader.reasoning_tokens for reader in readers)
    return json_response({**head, "object": "chat.completion", "choices": choices, "usage": usage.for_chat()})


def _choice(answer: Answer, reader: MessageReader, params: SamplingParams) -> dict[str, Any]:
    return {
        "index": answer.index,
        "message": reader.message(answer.pieces),
        "logprobs": None
        if params.logprobs is None
        else {"content": _logprobs(answer.token_ids, answer.logprobs, params)},
        "finish_reason": reader.reason(answer.finish_reason),
        "stop_reason": answer.stop_reason,
    }


async def _events(
    body: ChatRequest,
    params: SamplingParams,
    head: dict[str, Any],
    deltas: Deltas,
    readers: Sequence[MessageReader],
    usage: Usage,
    service: Service,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. What fails once it has begun is an event too."""
    options = body.stream_options or StreamOptions()

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**head, "choices": [choice], **usage.for_event(options)})

    request_id = ""
    try:
        for index in range(params.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(deltas):
            async for several in deltas:
                for delta in several:
                    request_id, reader, ended = delta.request_id, readers[delta.index], delta.finish_reason is not None
                    parts = [*reader.add(delta.text, len(delta.token_ids)), *(reader.end() if ended else ())]
                    usage.completion += len(delta.token_ids)
                    if delta.index == 0:
                        usage.cached = delta.num_cached_tokens
                        usage.receipt = delta.receipt if service.options.cache_receipts else None
                    usage.reasoning = sum(reader.reasoning_tokens for reader in readers)
                    logprobs = {}
                    if params.logprobs is not None and delta.token_ids:
                        logprobs = {"logprobs": {"content": _logprobs(delta.token_ids, delta.logprobs or (), params)}}
                    for part in parts:
                        yield chunk(delta.index, part, **logprobs)
                        logprobs = {}
                    if logprobs:
                        yield chunk(delta.index, {}, **logprobs)
                    if ended:
                        reason = reader.reason(delta.finish_reason)
                        yield chunk(delta.index, {}, finish_reason=reason, stop_reason=delta.stop_reason)
        if options.include_usage:
            yield event({**head, "choices": [], "usage": usage.for_chat()})
    except Exception as error:
        yield event(of_exception(error).body)
    finally:
        service.called(request_id, [name for reader in readers for name in reader.call_ids])
    yield DONE


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
