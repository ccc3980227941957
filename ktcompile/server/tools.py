"""Calls of tools in what a model writes, while it comes.

The notation is that of Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, between text. A call
that the client demands has no tags: a grammar makes the answer that object, or its arguments alone.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ktcompile.server.errors import ApiError
from ktcompile.server.protocol import ChatRequest, NamedTool, Tool
from ktcompile.server.tags import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a call: it begins, with its name, or its arguments go on."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def demanded(body: ChatRequest) -> dict[str, Any] | None:
    """Return the JSON schema of the answer where a call is demanded. ApiError: tool_choice cannot be followed."""
    choice, tools = body.tool_choice, body.tools or []
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise ApiError(400, "tool_choice demands a call, and there are no tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is no tool", param="tool_choice")
        return _parameters(named[0])
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def parser_for(body: ChatRequest) -> ToolParser | None:
    """Return what reads one answer, None where there are no calls in it."""
    if not body.tools or body.tool_choice == "none":
        return None
    if isinstance(body.tool_choice, NamedTool):
        return ToolParser(body.tools, forced=body.tool_choice.function.name)
    return ToolParser(body.tools, bare=body.tool_choice == "required")


class ToolParser:
    """Tells text from calls. forced: all of the answer are the arguments of this tool. bare: all of it is one call."""

    def __init__(self, tools: Sequence[Tool], *, forced: str | None = None, bare: bool = False) -> None:
        self._names = {tool.function.name for tool in tools}
        self._bare = bare
        self._held = self._blanks = ""
        self._arguments: _JsonValue | None = None  # of a call that has begun
        self._inside = bare
        self._ended = False  # the arguments of the call are complete
        self._forced = forced
        self.calls = 0

    def add(self, text: str) -> Iterator[str | CallDelta]:
        """Yield what some more text is: text of the answer, or parts of calls."""
        if self._forced is not None:
            if not self.calls:
                yield self._begin(self._forced)
            if text:
                yield CallDelta(self.calls - 1, arguments=text)
            return
        self._held += text
        while self._held:
            before = self._held, self._inside
            yield from self._call() if self._inside else self._text()
            if (self._held, self._inside) == before:
                return

    def end(self) -> Iterator[str | CallDelta]:
        """Yield what was held back."""
        held, self._held = self._held, ""
        if self._inside and self._arguments is None and held.strip():
            yield from self._whole(held, closed=False)
        elif not self._inside and (held.strip() or (held and not self.calls)):
            yield held

    def _text(self) -> Iterator[str | CallDelta]:
        place = self._held.find(OPEN)
        sure = place if place >= 0 else len(self._held) - overlap(self._held, OPEN)
        text = self._held[:sure].rstrip()  # blanks wait for what follows: before a call they are nothing
        if place >= 0:
            self._blanks, self._held = self._held[len(text) : place], self._held[place + len(OPEN) :]
            self._inside = True
        else:
            self._held = self._held[len(text) :]
        if text:
            yield text

    def _call(self) -> Iterator[str | CallDelta]:
        if self._arguments is None and not self._ended:
            head = _HEAD.match(self._held)
            close = self._held.find(CLOSE)
            if head is None or (name := json.loads(head[1])) not in self._names:
                if close >= 0:
                    body, self._held = self._held[:close], self._held[close + len(CLOSE) :]
                    self._inside = False
                    yield from self._whole(body, closed=True)
                return
            self._held = self._held[head.end() :]
            self._arguments = _JsonValue()
            yield self._begin(name)
        if self._arguments is not None:
            if not self._arguments.began:
                self._held = self._held.lstrip()
            taken = self._arguments.add(self._held)
            text, self._held = self._held[:taken], self._held[taken:]
            if text:
                yield CallDelta(self.calls - 1, arguments=text)
            if not self._arguments.ended:
                return
            self._arguments, self._ended = None, True
        close = self._held.find(CLOSE)
        if close >= 0 or self._bare:
            self._held = "" if self._bare else self._held[close + len(CLOSE) :]
            self._inside, self._ended = self._bare, self._bare

    def _whole(self, body: str, *, closed: bool) -> Iterator[str | CallDelta]:
        """Yield a call in another order, or as text what is none."""
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            name, arguments = None, None
        if not isinstance(name, str) or name not in self._names:
            yield body if self._bare else f"{self._blanks}{OPEN}{body}{CLOSE if closed else ''}"
            return
        yield self._begin(name)
        yield CallDelta(self.calls - 1, arguments=json.dumps(arguments, ensure_ascii=False))

    def _begin(self, name: str) -> CallDelta:
        self.calls += 1
        return CallDelta(self.calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", name=name)


class _JsonValue:
    """Finds the end of one object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._escaped = False
        self.began = self.ended = False

    def add(self, text: str) -> int:
        """Return how many characters belong to it."""
        self.began = self.began or bool(text)
        for place, character in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                if self._depth == 0:  # a number, or a word; the object around it ends
                    self.ended = True
                    return place
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return place + 1
        return len(text)


def _parameters(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **tool.function.parameters}
