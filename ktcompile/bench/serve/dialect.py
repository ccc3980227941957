"""What a server understands of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Api = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a request is written.

    api: /v1/completions or /v1/chat/completions. ids: prompts are token ids; else texts. full_length: what makes an
    answer as long as asked for: vLLM's `ignore_eos`, transformers' `generation_config`, or nothing. usage: of the
    tokens so far in each chunk (vLLM's `continuous_usage_stats`), at the end, or not asked for. extra: fields of each
    request."""

    api: Api
    ids: bool
    full_length: Literal["ignore_eos", "generation_config", None]
    usage: Literal["each", "last", None]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, model: str, prompt: str | list[int], tokens: int) -> bytes:
        """Return a request for an answer of that many tokens, in a stream, greedy."""
        content = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        record: dict[str, Any] = {"model": model, **content, "max_tokens": tokens, "temperature": 0, "stream": True}
        if self.full_length == "ignore_eos":
            record["ignore_eos"] = True
        elif self.full_length == "generation_config":
            # What it is given replaces the request's own fields.
            own = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            record["generation_config"] = json.dumps(own)
        if self.usage:
            record["stream_options"] = {"include_usage": True}
            if self.usage == "each":
                record["stream_options"]["continuous_usage_stats"] = True
        return json.dumps(record | dict(self.extra)).encode()

    def __str__(self) -> str:
        lengths = f"full length by {self.full_length}" if self.full_length else "answers may end early"
        usage = {"each": "usage in each chunk", "last": "usage at the end", None: "no usage asked for"}[self.usage]
        return f"{self.path}, prompts as {'token ids' if self.ids else 'text'}, {lengths}, {usage}"


def candidates(api: Api, ids: bool, extra: Mapping[str, Any]) -> list[Dialect]:
    """Return the ways to write a request, the one that says most first."""
    lengths: tuple[Literal["ignore_eos", "generation_config", None], ...] = ("ignore_eos", "generation_config", None)
    usages: tuple[Literal["each", "last", None], ...] = ("each", "last", None)
    kinds = (True, False) if ids and api == "completions" else (False,)
    return [Dialect(api, i, length, usage, extra) for i in kinds for length in lengths for usage in usages]
