"""The bodies of requests. What is not named here is refused by name; null means that a parameter was left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """A part of a body."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class StreamOptions(Strict):
    """continuous_usage_stats: vLLM's: with include_usage each event has what was used so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Strict):
    """vLLM's extension: one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Strict):
    """What all endpoints that generate have in common. The second group are extensions, with vLLM's names.

    timeout: seconds, in which the answer ends or is cut. cache_salt: keys and values are shared only with requests of
    the same one. user, metadata, safety_identifier and prompt_cache_key tell who asks, and change nothing: a prompt is
    found by its tokens.
    """

    model: str
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int = Field(0, ge=0, lt=1 << 31)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    timeout: float | None = Field(None, gt=0, le=1e6)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)


class Generation(Sampling):
    """What chat and text completions have in common."""

    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: str | list[str] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, float] | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionRequest(Generation):
    """The body of /v1/completions. prompt: texts or tokens, one or several."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Count = 16
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False


class Part(Strict):
    """A part of a message; its type says what else it has. Text alone is served."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One message. What clients send back of an answer beside these, empty, is dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str
    schema_: dict[str, Any] = Field({}, alias="schema")
    description: str | None = None
    strict: bool = False


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    """The body of /v1/chat/completions. chat_template_kwargs: variables of the model's template."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, bool | int | str] = {}
    store: Literal[False] = False


class TextFormat(Strict):
    """As of chat's response_format, flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool = False


class TextOptions(Strict):
    format: TextFormat | None = None


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None


class ResponsesRequest(Sampling):
    """The body of /v1/responses, for text."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    store: Literal[False] = False


class TokenizeRequest(Strict):
    """Of a text, or of messages as chat makes them a prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]
