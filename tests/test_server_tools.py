"""Calls of tools in text that comes in pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.server.protocol import Tool
from ktcompile.server.tools import CallDelta, ToolParser

TOOLS = [Tool.model_validate({"type": "function", "function": {"name": name, "parameters": {}}}) for name in "fg"]
ARGUMENTS = {"text": 'a "quoted" } \\ <tool_call> \u00e9', "list": [1, {"x": None}], "deep": {"a": {"b": []}}}


def read(text: str, cuts: list[int], **how: object) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls of an answer that comes in pieces."""
    parser = ToolParser(TOOLS, **how)  # type: ignore[arg-type]
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [p for a, b in itertools.pairwise(places) for p in parser.add(text[a:b])]
    said, calls = "", []
    for piece in (*pieces, *parser.end()):
        if isinstance(piece, str):
            said += piece
        elif isinstance(piece, CallDelta) and piece.id is not None:
            assert piece.index == len(calls)
            calls.append((piece.name or "", piece.arguments))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert parser.calls == len(calls)
    return said, calls


def call(name: str, arguments: object = ARGUMENTS) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@given(cuts=st.lists(st.integers(0, 1000), max_size=60))
def test_however_it_is_cut(cuts: list[int]) -> None:
    said, calls = read(f"Let me see.\n{call('f')}\n{call('g', {})} ", cuts)
    assert said.strip() == "Let me see."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", ARGUMENTS), ("g", {})]


@given(cuts=st.lists(st.integers(0, 1000), max_size=20))
@pytest.mark.parametrize(
    "text",
    ["plain < text <tool_ca", "<tool_call>no json</tool_call>", call("unknown"), "a <tool_call> b", " ", "x < y\n\n"],
)
def test_what_is_no_call_is_text(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == (text, [])


@given(cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_another_order_of_keys(cuts: list[int]) -> None:
    assert read('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', cuts) == ("", [("f", '{"a": 1}')])


@given(cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_calls_that_are_demanded_have_no_tags(cuts: list[int]) -> None:
    text = json.dumps({"name": "g", "arguments": ARGUMENTS})
    said, calls = read(text, cuts, bare=True)
    assert (said, calls) == ("", [("g", json.dumps(ARGUMENTS))])
    assert read('{"a": 1}', cuts, forced="f") == ("", [("f", '{"a": 1}')])


def test_a_call_that_is_cut_has_what_came() -> None:
    text = call("f")
    assert read(text[: text.index('"list"')], [5, 50])[1][0][0] == "f"
