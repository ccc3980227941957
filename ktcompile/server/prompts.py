"""From messages and texts to tokens, by the model's own tokenizer and template."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ktcompile.engine.detokenizer import decode
from ktcompile.models.tokenizer import token_ids
from ktcompile.server.errors import ApiError
from ktcompile.server.protocol import ChatRequest, InputMessage, Message, Part
from ktcompile.server.reasoning import CLOSE

T = TypeVar("T")

# For models that have none, such as the small one of the package, which continues text: tools, then one message after
# the other, without a word of who says it.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.content or (message.tool_calls | tojson) }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
)
# What a template is given by the server itself, and no request may set.
_OWN = frozenset({"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"})


class Prompts:
    """Makes prompts in a thread of its own, with a tokenizer of its own: long ones hold neither loop nor engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.has_think_tags = CLOSE in template or CLOSE in tokenizer.get_added_vocab()
        self._thread = ThreadPoolExecutor(1, "ktcompile-prompts")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` does, in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def of_text(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text. special: those that the tokenizer adds, too."""
        if special:
            return await self.run(lambda: token_ids(self._tokenizer, text))
        return await self.run(lambda: list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))

    async def text_of(self, tokens: Sequence[int]) -> str:
        return await self.run(lambda: decode(self._tokenizer, list(tokens), skip_special_tokens=False))

    async def of_chat(self, body: ChatRequest) -> tuple[str, list[int]]:
        """Return the text and the tokens of a chat. ApiError: the template refuses it."""
        wrong = _OWN & body.chat_template_kwargs.keys()
        if wrong:
            raise ApiError(400, f"chat_template_kwargs has {min(wrong)!r}", param="chat_template_kwargs")
        tools = None
        if body.tools and body.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        return await self.of_messages(body.messages, tools, body.chat_template_kwargs)

    async def of_messages(
        self,
        messages: Sequence[Message | InputMessage],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """Return the text and the tokens of messages. ApiError: the template refuses them."""
        given = [_for_template(message) for message in messages]
        template = None if self.has_template else PLAIN_TEMPLATE

        def render() -> tuple[str, list[int]]:
            from jinja2 import TemplateError

            try:
                text = self._tokenizer.apply_chat_template(
                    given,
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                    **(variables or {}),
                )
            except (TemplateError, TypeError, KeyError) as error:
                raise ApiError(400, f"the model's chat template refuses this: {error}", param="messages") from error
            # A template writes special tokens itself.
            return text, list(self._tokenizer(text, add_special_tokens=template is not None)["input_ids"])

        return await self.run(render)


def _for_template(message: Message | InputMessage) -> dict[str, Any]:
    """Return a message as templates know it: text, and arguments of calls as values."""
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": text_of_parts(message.content)}
    if isinstance(message, InputMessage):
        return result
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            result[name] = getattr(message, name)
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _value(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def text_of_parts(content: str | list[Part] | None) -> str:
    """Return the text of a message. ApiError: it has something else."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400, f"a message has a part of type {part.type!r}; this model reads text", param="messages.content"
            )
    return "\n".join(part.text or "" for part in content)


def _value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
