"""Answers that follow a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
import torch

from ktcompile import LLM, SamplingParams
from ktcompile.engine.completion import Completion
from ktcompile.engine.sampler import Sampled, sample
from ktcompile.engine.sampling_params import StructuredOutputsParams, Thought
from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def answer(llm: LLM, seed: int | None, /, max_tokens: int = 200, **structured: object) -> tuple[str, str | None]:
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if seed is None else 1.5,
        seed=seed,
        structured_outputs=StructuredOutputsParams(**structured),  # type: ignore[arg-type]
    )
    output = llm.generate("import ", params)[0].outputs[0]
    return output.text, output.finish_reason


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_an_answer_has_the_schema(llm: LLM, seed: int | None) -> None:
    text, reason = answer(llm, seed, json=SCHEMA)
    assert reason == "stop"
    value = json.loads(text)
    assert set(value) == {"name", "age"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert value["age"] in range(10)


def test_a_choice_a_regex_and_a_grammar(llm: LLM) -> None:
    for seed in range(4):
        assert answer(llm, seed, choice=["red", "green \u00e9"])[0] in ("red", "green \u00e9")
        assert re.fullmatch("[0-9]{3}-[a-f]{2}", answer(llm, seed, regex="[0-9]{3}-[a-f]{2}")[0])
        assert answer(llm, seed, grammar='start: "a" B\nB: /b{2,3}/')[0] in ("abb", "abbb")


def test_an_object_begins_as_one_and_may_be_cut(llm: LLM) -> None:
    text, reason = answer(llm, 1, max_tokens=3, json_object=True)
    assert text.startswith("{")
    assert reason in ("length", "stop")


def test_min_tokens_does_not_leave_a_grammar_without_tokens(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=20, min_tokens=20, temperature=0.0, structured_outputs=StructuredOutputsParams(regex="ab?")
    )
    assert llm.generate("x", params)[0].outputs[0].text in ("a", "ab")


def test_answers_of_a_request_have_a_grammar_each(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, temperature=2.0, structured_outputs=StructuredOutputsParams(regex="[a-z]{5}"))
    texts = [output.text for output in llm.generate("x", params)[0].outputs]
    assert all(re.fullmatch("[a-z]{5}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, "nothing"),
        ({"regex": "a", "choice": ["b"]}, "regex, choice"),
        ({"choice": []}, "choice"),
        ({"regex": "("}, "regex"),
        ({"json": {"type": "no such type"}}, "json"),
        ({"json": "{"}, "json|JSON|EOF"),
        ({"grammar": "start: nobody"}, "grammar"),
    ],
)
def test_what_is_no_grammar_is_refused(llm: LLM, given: dict[str, object], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        answer(llm, None, **given)


def said_by(script: str, *, begun: bool, tags: Sequence[str] = (), form: str = "[0-9]{3}") -> str:
    """Return what a model of numbers says that would say `script`, where the grammar lets it, and else what is allowed.

    tags: those that are tokens of its tokenizer.
    """
    tokenizer = load_tokenizer(locate(None))
    tokenizer.add_tokens(list(tags))
    wanted = tokenizer(script, add_special_tokens=False)["input_ids"]
    structured = StructuredOutputsParams(regex=form, thought=Thought("<think>", "</think>", begun))
    params = SamplingParams(max_tokens=None, temperature=0.0, structured_outputs=structured)
    completion = Completion(params, tokenizer, [1], (), limit=40)
    while completion.finish_reason is None:
        logits = torch.zeros(1, len(tokenizer))
        if completion.state.num_tokens < len(wanted):
            logits[0, wanted[completion.state.num_tokens]] = 1.0
        completion.add(sample(logits, [completion.state])[0])
    assert completion.finish_reason == "stop"
    return completion.output().text


@pytest.mark.parametrize("tags", [(), ("<think>", "</think>")])
def test_a_grammar_begins_behind_the_thought(tags: tuple[str, ...]) -> None:
    assert said_by("Is it 12? </think>123", begun=True, tags=tags) == "Is it 12? </think>123"
    # What would follow it otherwise is not said.
    answer = said_by("12</think> It is 7", begun=True, tags=tags)
    assert re.fullmatch("12</think>[0-9]{3}", answer)
    assert re.fullmatch("</think>[0-9]{3}", said_by("</think></think>", begun=True, tags=tags))


def test_a_thought_may_begin_with_its_token_alone_and_once() -> None:
    tags = ("<think>", "</think>")
    assert said_by("<think>Is it?</think>123", begun=False, tags=tags) == "<think>Is it?</think>123"
    assert said_by("123", begun=False, tags=tags) == "123"
    assert re.fullmatch("[0-9]{3}", said_by("It is<think>", begun=False, tags=tags))
    assert re.fullmatch("1[0-9]{2}", said_by("1<think>Is it?</think>", begun=False, tags=tags))
    # Where the tag is several tokens its first ones may be the grammar's.
    assert re.fullmatch("[0-9]{3}", said_by("<think>Is it?</think>123", begun=False))


def test_an_answer_may_end_in_its_thought() -> None:
    tokenizer = load_tokenizer(locate(None))
    structured = StructuredOutputsParams(json_object=True, thought=Thought("<think>", "</think>", True))
    completion = Completion(SamplingParams(structured_outputs=structured), tokenizer, [1], (), limit=3)
    for _ in range(3):
        completion.add(Sampled(2))
    assert completion.finish_reason == "length"
