"""The official client against the server, on the model of the package."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from helpers.servers import Running, call, running
from openai import OpenAI

from ktcompile import LLM, SamplingParams
from ktcompile.engine.engine import Engine

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CHAT = [{"role": "user", "content": "def fibonacci(n):"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Engine()) as result:
        yield result


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id).id == only.id
    return only.id


def test_greedy_text_is_that_of_the_llm(client: OpenAI, model: str) -> None:
    prompts = ["def fibonacci(n):", "import os\n", "class Stack:\n    def"]
    expected = LLM().generate(prompts, SamplingParams(max_tokens=24, temperature=0.0))
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=24, temperature=0)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    ids = [output.prompt_token_ids for output in expected]
    again = client.completions.create(model=model, prompt=ids, max_tokens=24, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.usage and answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == sum(len(output.outputs[0].token_ids) for output in expected)


def test_a_stream_is_the_whole_in_pieces(client: OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="import ", max_tokens=30, temperature=0)
    pieces, usage = [], None
    for chunk in client.completions.create(
        model=model, prompt="import ", max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        pieces += [choice.text for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 5
    assert usage == whole.usage
    each = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=model, prompt="import ", max_tokens=30, temperature=0, stream=True, stream_options=each
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks) and counts == [*range(1, 31), 30] and chunks[-1].usage == whole.usage


def test_several_prompts_in_a_stream(client: OpenAI, model: str) -> None:
    prompts = ["import ", "class A"]
    whole = client.completions.create(model=model, prompt=prompts, max_tokens=9, seed=3, n=2, echo=True)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(
        model=model, prompt=prompts, max_tokens=9, seed=3, n=2, echo=True, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert texts[0].startswith("import ") and texts[3].startswith("class A")


def test_chat_whole_and_streamed(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=20, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage and whole.usage.completion_tokens == 20
    assert whole.usage.prompt_tokens_details and whole.usage.prompt_tokens_details.cached_tokens == 0
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=CHAT,
            max_completion_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_seeds_repeat_and_answers_differ(client: OpenAI, model: str) -> None:
    def texts(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=model, messages=CHAT, max_tokens=12, n=3, seed=seed, temperature=1.2, top_p=0.9
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) > 1


def test_answers_do_not_depend_on_who_else_asks(client: OpenAI, model: str) -> None:
    def ask(i: int) -> str:
        prompt = "import os\n" * (1 + 7 * i)
        return client.completions.create(model=model, prompt=prompt, max_tokens=30, seed=i, top_p=0.95).choices[0].text

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(8))) == alone


def test_what_was_computed_before_is_told_and_not_shared_across_salts(
    server: Running, client: OpenAI, model: str
) -> None:
    prompt = [300 + i for i in range(200)]  # three blocks and a part of one

    def cached(salt: str | None, **more: Any) -> tuple[int, str]:
        extra = {} if salt is None else {"cache_salt": salt}
        given: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        answer = client.completions.create(**given, extra_body=extra)
        assert answer.usage and answer.usage.prompt_tokens_details
        return answer.usage.prompt_tokens_details.cached_tokens or 0, answer.choices[0].text

    first = cached(None)
    assert first[0] == 0
    assert cached(None) == (192, first[1])
    assert cached("a") == first and cached("b") == first
    assert cached("a") == (192, first[1])
    assert cached(None, prompt=[prompt, prompt])[0] == 2 * 192
    *_, last = client.completions.create(
        model=model, prompt=prompt, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage and last.usage.prompt_tokens_details and last.usage.prompt_tokens_details.cached_tokens == 192
    messages = [{"role": "user", "content": "x = 1\n" * 60}]
    for streams in (False, True):
        client.chat.completions.create(model=model, messages=messages, max_tokens=1)
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=1,
            stream=streams,
            **({"stream_options": {"include_usage": True}} if streams else {}),
        )
        usage = list(answer)[-1].usage if streams else answer.usage
        assert usage.prompt_tokens_details.cached_tokens >= 64
    response = client.responses.create(model=model, input="x = 1\n" * 60, max_output_tokens=1)
    assert response.usage and response.usage.input_tokens_details.cached_tokens >= 64
    text = call(server, "/metrics").body.decode()
    hits, queries = (
        float(re.findall(rf"prefix_cache_{name}_total{{.*}} (.*)", text)[0]) for name in ("hits", "queries")
    )
    assert 7 * 192 <= hits < queries
    with pytest.raises(openai.UnprocessableEntityError, match="cache_salt"):
        cached("")


def test_stop_ends_before_its_text(client: OpenAI, model: str) -> None:
    free = client.completions.create(model=model, prompt="import ", max_tokens=40, temperature=0).choices[0].text
    stop = free[len(free) // 2 :][:5]
    cut = client.completions.create(model=model, prompt="import ", max_tokens=40, temperature=0, stop=[stop])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_of_chat_and_completions(client: OpenAI, model: str) -> None:
    chat = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert bytes(token.bytes or []).decode() == token.token
    streamed = [
        token
        for chunk in client.chat.completions.create(
            model=model, messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, stream=True
        )
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert streamed == chat.choices[0].logprobs.content
    text = client.completions.create(model=model, prompt="import ", max_tokens=5, temperature=0, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert all(
        max(top.values()) == own for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )


def test_logit_bias_and_penalties_count(client: OpenAI, model: str) -> None:
    forced = client.completions.create(model=model, prompt="x", max_tokens=3, temperature=0, logit_bias={"77": 100})
    text = forced.choices[0].text
    assert text == 3 * text[: len(text) // 3]
    again = {"extra_body": {"repetition_penalty": 50.0}, "max_tokens": 40}
    penalised = client.completions.create(model=model, prompt="import ", temperature=0, **again)
    plain = client.completions.create(model=model, prompt="import ", max_tokens=40, temperature=0)
    assert penalised.choices[0].text != plain.choices[0].text


def test_json_schema(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_tokens=100,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"a", "b"} and value["b"] in ("x", "y")
    assert answer.choices[0].finish_reason == "stop"
    chosen = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    matched = client.completions.create(
        model=model, prompt="x", max_tokens=20, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}}
    )
    assert re.fullmatch("[0-9]{4}", matched.choices[0].text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_demanded_comes(client: OpenAI, model: str, choice: object) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=100, seed=2, tools=[TOOL], tool_choice=choice
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls and len(message.tool_calls) == 1 and not message.content
    call = message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    name, arguments = "", ""
    for chunk in client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=100, seed=2, tools=[TOOL], tool_choice=choice, stream=True
    ):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)
    # The answer to the call goes back.
    more = client.chat.completions.create(
        model=model,
        messages=[*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}],
        max_tokens=3,
        tools=[TOOL],
    )
    assert more.usage and more.usage.completion_tokens <= 3


def test_responses(client: OpenAI, model: str) -> None:
    whole = client.responses.create(
        model=model, input="def f(", instructions="# Python", max_output_tokens=12, temperature=0
    )
    assert whole.status == "incomplete" and whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.output_tokens == 12
    events = list(
        client.responses.create(
            model=model, input="def f(", instructions="# Python", max_output_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage
    text = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    formed = client.responses.create(model=model, input="x", max_output_tokens=100, temperature=0, text=text)
    assert formed.status == "completed" and set(json.loads(formed.output_text)) == {"a", "b"}


def test_the_clients_own_reader_of_response_streams_is_content(client: OpenAI, model: str) -> None:
    """It keeps a snapshot by the indices of items and parts, and fails where an event does not fit."""
    kinds, text = [], ""
    with client.responses.stream(model=model, input="def f(", max_output_tokens=12, temperature=0) as stream:
        for event in stream:
            kinds.append(event.type.removeprefix("response."))
            if event.type == "response.output_text.delta":
                text += event.delta
                assert event.snapshot == text
            if event.type == "response.output_text.done":
                assert event.text == text
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]


def test_errors_have_the_classes_of_the_client(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="x", suffix="y")
    assert caught.value.param == "suffix" and caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="x", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.completions.create(model=model, prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="image_url"):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model=model, messages=CHAT, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="regex"):
        client.completions.create(model=model, prompt="x", extra_body={"structured_outputs": {"regex": "("}})
