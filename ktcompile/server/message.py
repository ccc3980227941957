"""From the text of an answer to the parts of a chat's message: what was thought, what is said, which calls are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ktcompile.server import tools
from ktcompile.server.protocol import ChatRequest
from ktcompile.server.reasoning import ReasoningParser


class MessageReader:
    """Reads one answer while it comes. Parts are as in the deltas of a stream.

    reasoning: None where nothing is thought. reasoning_tokens: so far. call_ids: of the calls that have begun.
    """

    def __init__(self, body: ChatRequest, reasoning: ReasoningParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools.parser_for(body)
        self.reasoning_tokens = 0
        self.call_ids: list[str] = []

    def add(self, text: str, tokens: int) -> Iterator[dict[str, Any]]:
        """Yield what some more text of so many tokens adds to the message."""
        if self._reasoning is None:
            yield from self._said(text)
            return
        before = self._reasoning.inside
        yield from self._told_apart(self._reasoning.add(text))
        if before or self._reasoning.inside:
            self.reasoning_tokens += tokens

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield what was held back."""
        if self._reasoning is not None:
            yield from self._told_apart(self._reasoning.end())
        if self._tools is not None:
            yield from self._parts(self._tools.end())

    def message(self, pieces: Iterable[tuple[str, int]]) -> dict[str, Any]:
        """Return the message of a whole answer."""
        parts = [part for text, tokens in pieces for part in self.add(text, tokens)]
        parts += self.end()
        content = "".join(part.get("content", "") for part in parts)
        plain = self._tools is None and self._reasoning is None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or plain else None,
            "refusal": None,
        }
        if self._reasoning is not None:
            thought = "".join(part.get("reasoning_content", "") for part in parts)
            message["reasoning_content"] = thought or None
        calls: list[dict[str, Any]] = []
        for call in (call for part in parts for call in part.get("tool_calls", ())):
            if "id" in call:
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if calls:
            message["tool_calls"] = calls
        return message

    def reason(self, reason: str | None) -> str | None:
        """Return why the answer ended, for the client."""
        return "tool_calls" if reason == "stop" and self.call_ids else reason

    def _told_apart(self, pieces: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for kind, text in pieces:
            if kind == "content":
                yield from self._said(text)
            else:
                yield {kind: text}

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        if self._tools is not None:
            yield from self._parts(self._tools.add(text))
        elif text:
            yield {"content": text}

    def _parts(self, pieces: Iterable[str | tools.CallDelta]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            if isinstance(piece, str):
                yield {"content": piece}
                continue
            function = {"arguments": piece.arguments}
            if piece.id is None:
                yield {"tool_calls": [{"index": piece.index, "function": function}]}
            else:
                self.call_ids.append(piece.id)
                call = {"id": piece.id, "type": "function", "function": {"name": piece.name, **function}}
                yield {"tool_calls": [{"index": piece.index, **call}]}
