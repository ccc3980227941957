"""Prompts in files: texts, or JSONL of what clients of a server send."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktcompile.server.prompts import Prompts
    from ktcompile.server.protocol import ChatRequest, CompletionRequest

FORMATS = ("text", "jsonl")


@dataclass(frozen=True, slots=True)
class Given:
    """A prompt as it was given. name: of its file, and of its line. value: a text, or what a line of JSONL has."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as an engine takes it."""

    name: str
    ids: list[int]
    cache_salt: str


def read(files: Sequence[str], form: str | None) -> list[Given]:
    """Return the prompts of files, where "-" is stdin. form: one of FORMATS for all; None: as each one's name says.

    FileNotFoundError. ValueError: a file is no text, a line no JSON, or there is no prompt.
    """
    found = [each for file in files for each in _of_file(file, form)]
    if not found:
        raise ValueError(f"there is no prompt in {', '.join(files)}")
    return found


async def tokenized(prompts: Prompts, given: Given, role: str | None) -> list[Prompt]:
    """Return the prompts that one stands for, a body of /v1/completions having several.

    role: of the message that a text is; None: it is the prompt. ValueError: it is none, or the model's chat template
    refuses it.
    """
    from pydantic import ValidationError

    from ktcompile.server.errors import ApiError, of_validation
    from ktcompile.server.protocol import ChatRequest

    try:
        body = _body(given.value, role)
        if isinstance(body, ChatRequest):
            found = [(await prompts.of_chat(body))[1]]
        else:
            found = [await prompts.of_text(p) if isinstance(p, str) else list(p) for p in _several(body)]
    except ValidationError as error:
        raise ValueError(f"{given.name}: {of_validation(error.errors())}") from error
    except (ApiError, ValueError) as error:
        raise ValueError(f"{given.name}: {error}") from error
    return [Prompt(given.name, ids, body.cache_salt or "") for ids in found]


def _of_file(file: str, form: str | None) -> Iterator[Given]:
    name = "stdin" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if form == "text" or (form is None and not name.endswith(".jsonl")):
        if text:
            yield Given(name, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield Given(f"{name}:{number}", json.loads(line))
            except ValueError as error:
                raise ValueError(f"{name}:{number} is no JSON: {error}") from error


def _body(value: Any, role: str | None) -> ChatRequest | CompletionRequest:
    """Return the request that a prompt stands for. ValidationError, ValueError: it stands for none."""
    from ktcompile.server.protocol import ChatRequest, CompletionRequest

    if isinstance(value, str):
        value = {"prompt": value} if role is None else {"messages": [{"role": role, "content": value}]}
    elif isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no prompt; give a text, messages, or an object with prompt or messages")
    kind = ChatRequest if "messages" in value else CompletionRequest
    return kind.model_validate({"model": "", **value})


def _several(body: CompletionRequest) -> list[str] | list[list[int]]:
    prompt: Any = body.prompt
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
