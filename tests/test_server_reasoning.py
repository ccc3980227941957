"""Thought in text that comes in pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine
from helpers.servers import Running, call, running
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.server.options import ServerOptions
from ktcompile.server.reasoning import ReasoningParser, parser_for

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}<|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think></think>\n{% endif %}"
)
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
SCRIPT = ["Let", " me", " see", ".\n", "</think>", "\n\n", "Yes.", CALL]
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(text: str, cuts: list[int], *, inside: bool = False) -> tuple[str, str]:
    """Return the thought and the content of an answer that comes in pieces."""
    parser = ReasoningParser(inside=inside)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [p for a, b in itertools.pairwise(places) for p in parser.add(text[a:b])]
    said = {"reasoning_content": "", "content": ""}
    for kind, piece in (*pieces, *parser.end()):
        assert piece
        said[kind] += piece
    return said["reasoning_content"], said["content"]


@given(cuts=st.lists(st.integers(0, 1000), max_size=40))
@pytest.mark.parametrize(
    ("text", "inside", "thought", "content"),
    [
        ("<think>\nLet me see. 1 < 2\n</think>\n\nYes.\n", False, "Let me see. 1 < 2", "Yes.\n"),
        ("\n<think>a\n\nb</think>c</think>", False, "a\n\nb", "c</think>"),
        ("Let me see.\n</think>\n\nYes.", True, "Let me see.", "Yes."),
        ("<think>\nLet me see.</think>Yes.", True, "Let me see.", "Yes."),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("cut at its end ", True, "cut at its end", ""),
        ("<think></think>Yes.", False, "", "Yes."),
        (" a <think>b</think> c ", False, "", " a <think>b</think> c "),
        ("<thin", False, "", "<thin"),
        ("\n", False, "", "\n"),
        ("", True, "", ""),
    ],
)
def test_however_it_is_cut(text: str, inside: bool, thought: str, content: str, cuts: list[int]) -> None:
    assert read(text, cuts, inside=inside) == (thought, content)


def test_the_prompt_and_the_model_say_where_thought_begins() -> None:
    open_prompt, closed = "<|assistant|>\n<think>\n", "<|assistant|>\n<think>\n\n</think>\n\n"
    assert parser_for("none", open_prompt, has_tags=True) is None
    assert parser_for("auto", open_prompt, has_tags=False) is None
    found = {
        (choice, prompt): parser.inside
        for choice in ("auto", "qwen3", "deepseek_r1")
        for prompt in (open_prompt, closed, "")
        if (parser := parser_for(choice, prompt, has_tags=True)) is not None
    }
    assert {key for key, inside in found.items() if not inside} == {
        (choice, prompt) for choice in ("auto", "qwen3") for prompt in (closed, "")
    }
    assert len(found) == 9


def server_of(**options: Any) -> Iterator[Running]:
    tokenizer = load_tokenizer(locate(None))
    tokenizer.chat_template = TEMPLATE
    with running(FakeEngine(tokenizer=tokenizer, script=SCRIPT), ServerOptions(port=0, **options)) as result:
        yield result


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    yield from server_of()


def test_a_chat_has_thought_content_and_calls_apart(server: Running) -> None:
    reply = call(server, "/v1/chat/completions", {**BODY, "tools": [TOOL]}).json
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "Yes.")
    assert [made["function"]["name"] for made in message["tool_calls"]] == ["f"]
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5  # with the tag that ends it
    streamed = call(server, "/v1/chat/completions", {**BODY, "tools": [TOOL], "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in streamed]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    assert sum("reasoning_content" in delta for delta in deltas) == 4
    # What was thought goes back with a message, and the template may leave it out.
    again = [*BODY["messages"], {k: message[k] for k in ("role", "content", "reasoning_content")}]
    assert call(server, "/v1/chat/completions", {**BODY, "messages": again}).status == 200


def test_a_model_that_is_told_not_to_think_says_all(server: Running) -> None:
    body = {**BODY, "chat_template_kwargs": {"enable_thinking": False}}
    message = call(server, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert message["content"] == "".join(SCRIPT) and message["reasoning_content"] is None


@dataclass
class RememberingEngine(FakeEngine):
    """given: the parameters of its requests."""

    given: list[SamplingParams] = field(default_factory=list)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, **more: Any) -> None:
        self.given.append(params)
        super().add(request_id, prompt_token_ids, params, **more)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(("parser", "begun"), [("auto", True), ("none", None)])
def test_a_form_is_that_of_the_content(path: str, parser: str, begun: bool | None) -> None:
    tokenizer = load_tokenizer(locate(None))
    tokenizer.chat_template = TEMPLATE
    engine = RememberingEngine(tokenizer=tokenizer, script=["Let me see.", "</think>", "\n{}"])
    form: dict[str, Any] = {"response_format": {"type": "json_object"}}
    if path == "/v1/responses":
        form = {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 50}
        form = {"model": "fake", "input": "hello", **form}
    with running(engine, ServerOptions(port=0, reasoning_parser=parser)) as server:
        reply = call(server, path, form if "input" in form else {**BODY, **form}).json
    (params,) = engine.given
    assert params.structured_outputs is not None and params.structured_outputs.json_object
    thought = params.structured_outputs.thought
    assert (None if thought is None else thought.begun) is begun
    if path == "/v1/responses":
        kinds = [item["type"] for item in reply["output"]]
        assert kinds == (["reasoning", "message"] if begun else ["message"])
    else:
        message = reply["choices"][0]["message"]
        assert message["content"] == ("{}" if begun else "Let me see.</think>\n{}")
        assert message.get("reasoning_content") == ("Let me see." if begun else None)


def test_a_demanded_call_comes_behind_the_thought() -> None:
    tokenizer = load_tokenizer(locate(None))
    tokenizer.chat_template = TEMPLATE
    engine = RememberingEngine(tokenizer=tokenizer, script=["Let me see.", "</think>", "\n", '{"a": 1}'])
    body = {**BODY, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    with running(engine, ServerOptions(port=0)) as server:
        message = call(server, "/v1/chat/completions", body).json["choices"][0]["message"]
        closed = {**body, "chat_template_kwargs": {"enable_thinking": False}}
        call(server, "/v1/chat/completions", closed)
    assert message["reasoning_content"] == "Let me see."
    assert [made["function"] for made in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}]
    forms = [params.structured_outputs for params in engine.given]
    assert [form.thought.begun for form in forms if form is not None and form.thought is not None] == [True, False]


def test_none_leaves_all_as_it_is() -> None:
    for server in server_of(reasoning_parser="none"):
        message = call(server, "/v1/chat/completions", BODY).json["choices"][0]["message"]
        assert message["content"] == "".join(SCRIPT) and "reasoning_content" not in message
    with pytest.raises(ValueError, match="qwen3"):
        ServerOptions(reasoning_parser="deepseek")


def test_responses_have_an_item_for_what_was_thought(server: Running) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    whole = client.responses.create(model="fake", input="hello", max_output_tokens=50)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "Let me see." and whole.output_text == f"Yes.{CALL}"
    assert whole.usage and whole.usage.output_tokens_details.reasoning_tokens == 5
    kinds, thought = [], ""
    with client.responses.stream(model="fake", input="hello", max_output_tokens=50) as stream:
        for event in stream:
            kinds.append(event.type.removeprefix("response."))
            thought += event.delta if event.type == "response.reasoning_text.delta" else ""
        final = stream.get_final_response()
    assert thought == "Let me see."
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]

    def told(response: Any) -> Any:
        return json.loads(response.model_dump_json(include={"status": True, "usage": True}))

    assert told(final) == told(whole) and final.output_text == whole.output_text
