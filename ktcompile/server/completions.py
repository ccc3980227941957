"""/v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from ktcompile.engine.outputs import Logprobs
from ktcompile.server.errors import ApiError, json_response, of_exception
from ktcompile.server.protocol import CompletionRequest, StreamOptions
from ktcompile.server.sampling import of_completion
from ktcompile.server.service import Ask, Deltas, Service, api_errors, finite, gather_or_cancel
from ktcompile.server.sse import DONE, EventStream, event
from ktcompile.server.usage import Usage

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta

_MOST_PROMPTS = 64
_Prompt = tuple[str | None, list[int]]


async def respond(body: CompletionRequest, request: Request, service: Service) -> Response:
    """Return what follows one or several texts."""
    service.check_model(body.model)
    with api_errors():
        params = of_completion(body, service.options, service.defaults)
    prompts = await _prompts(body, service)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.name,
    }
    usage = service.usage(sum(len(ids) for _, ids in prompts))
    asks = [Ask(request, ids, params, text, body.timeout, body.cache_salt) for text, ids in prompts]
    echoed = [text if body.echo and text else "" for text, _ in prompts]
    if body.stream:
        opened: list[Deltas] = await gather_or_cancel([service.open(ask) for ask in asks])
        events = _events(body, head, opened, echoed, usage)
        return EventStream(events, service.options.write_timeout)
    answers = await gather_or_cancel([service.answer(ask) for ask in asks])
    choices = []
    for place, of_prompt in enumerate(answers):
        for answer in of_prompt:
            logprobs = None
            if params.logprobs is not None:
                logprobs = _logprobs(answer.token_ids, answer.logprobs, params.logprobs, 0)[0]
            choices.append(
                {
                    "index": place * body.n + answer.index,
                    "text": echoed[place] + answer.text,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
    usage.cached = sum(of_prompt[0].cached for of_prompt in answers)
    usage.completion = sum(len(answer.token_ids) for of_prompt in answers for answer in of_prompt)
    return json_response({**head, "choices": choices, "usage": usage.for_chat()})


async def _prompts(body: CompletionRequest, service: Service) -> list[_Prompt]:
    """Return each prompt with its text, where it has one or echo needs it, and its tokens."""
    given: Any = body.prompt
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(several) > _MOST_PROMPTS:
        raise ApiError(400, f"there are {len(several)} prompts; {_MOST_PROMPTS} are allowed at most", param="prompt")
    result: list[_Prompt] = []
    for prompt in several:
        if isinstance(prompt, str):
            with api_errors():
                result.append((prompt, await service.prompts.of_text(prompt)))
        else:
            if any(token >= service.vocab_size for token in prompt):
                raise ApiError(400, f"prompt has tokens that are not 0 to {service.vocab_size - 1}", param="prompt")
            result.append((await service.prompts.text_of(prompt) if body.echo else None, prompt))
    return result


async def _events(
    body: CompletionRequest, head: dict[str, Any], opened: Sequence[Deltas], echoed: Sequence[str], usage: Usage
) -> AsyncGenerator[bytes, None]:
    options = body.stream_options or StreamOptions()
    places: dict[int, int] = {}  # by choice: characters so far
    try:
        async with aclosing(_merged(opened)) as merged:
            async for number, deltas in merged:
                for delta in deltas:
                    usage.completion += len(delta.token_ids)
                    index = number * body.n + delta.index
                    text = delta.text if index in places else echoed[number] + delta.text
                    if index not in places and delta.index == 0:
                        usage.cached += delta.num_cached_tokens
                    logprobs = None
                    before = places.setdefault(index, 0)
                    if body.logprobs is not None and delta.logprobs is not None:
                        logprobs, before = _logprobs(delta.token_ids, delta.logprobs, body.logprobs, before)
                        places[index] = before
                    choice = {
                        "index": index,
                        "text": text,
                        "logprobs": logprobs,
                        "finish_reason": delta.finish_reason,
                        "stop_reason": delta.stop_reason,
                    }
                    yield event({**head, "choices": [choice], **usage.for_event(options)})
        if options.include_usage:
            yield event({**head, "choices": [], "usage": usage.for_chat()})
    except Exception as error:
        yield event(of_exception(error).body)
    yield DONE


async def _merged(opened: Sequence[Deltas]) -> AsyncGenerator[tuple[int, list[Delta]], None]:
    """Yield what comes of several streams, with the number of the stream. Nothing is read before it is asked for."""
    if len(opened) == 1:
        async with aclosing(opened[0]) as only:
            async for deltas in only:
                yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, list[Delta]] | BaseException | None] = asyncio.Queue(1)

    async def read(number: int, stream: Deltas) -> None:
        try:
            async with aclosing(stream):
                async for deltas in stream:
                    await queue.put((number, deltas))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(read(number, stream)) for number, stream in enumerate(opened)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Logprobs], count: int, begin: int
) -> tuple[dict[str, Any], int]:
    """Return OpenAI's record of log-probabilities, and where the text of the tokens ends. begin: where it begins."""
    tokens: list[str] = []
    offsets: list[int] = []
    top: list[dict[str, float]] = []
    for token, found in zip(token_ids, logprobs, strict=True):
        text = found[token].decoded_token or ""
        tokens.append(text)
        offsets.append(begin)
        begin += len(text)
        likeliest = sorted(found.values(), key=lambda other: other.rank)[:count]
        chosen = [found[token]] if count else []
        top.append({other.decoded_token or "": finite(other.logprob) for other in (*likeliest, *chosen)})
    own = [finite(found[token].logprob) for token, found in zip(token_ids, logprobs, strict=True)]
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}, begin
