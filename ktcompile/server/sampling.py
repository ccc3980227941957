"""From the parameters of a body to those of the sampler."""

from __future__ import annotations

import re
from typing import Any

from ktcompile.engine.sampling_params import SamplingParams, StructuredOutputsParams
from ktcompile.server.errors import ApiError
from ktcompile.server.options import ServerOptions
from ktcompile.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    ResponseFormat,
    ResponsesRequest,
    Sampling,
    StructuredOutputs,
)


def of_chat(
    body: ChatRequest, options: ServerOptions, tool_schema: dict[str, Any] | None, defaults: dict[str, Any]
) -> SamplingParams:
    """Return the parameters of a chat. tool_schema: what a call that the client demands must look like."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    _at_most("top_logprobs", body.top_logprobs or 0, options.max_logprobs)
    structured = _structured(body.response_format, body.structured_outputs)
    if tool_schema is not None:
        if structured is not None:
            raise ApiError(400, "tool_choice demands a call, so there can be no response_format", param="tool_choice")
        structured = StructuredOutputsParams(json=tool_schema)
    return _params(
        body,
        options,
        defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        structured_outputs=structured,
    )


def of_completion(body: CompletionRequest, options: ServerOptions, defaults: dict[str, Any]) -> SamplingParams:
    """Return the parameters of a text completion."""
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo cannot be had together with logprobs", param="echo")
    _at_most("logprobs", body.logprobs or 0, options.max_logprobs)
    structured = _structured(None, body.structured_outputs)
    return _params(
        body, options, defaults, max_tokens=body.max_tokens, logprobs=body.logprobs, structured_outputs=structured
    )


def of_responses(body: ResponsesRequest, options: ServerOptions, defaults: dict[str, Any]) -> SamplingParams:
    """Return the parameters of a response."""
    form = body.text.format if body.text else None
    structured = None
    if form is not None and form.type == "json_object":
        structured = StructuredOutputsParams(json_object=True)
    elif form is not None and form.type == "json_schema":
        if form.schema_ is None:
            raise ApiError(400, "text.format is json_schema without a schema", param="text.format.schema")
        structured = StructuredOutputsParams(json=form.schema_)
    return _params(body, options, defaults, max_tokens=body.max_output_tokens, structured_outputs=structured)


def _params(body: Sampling, options: ServerOptions, defaults: dict[str, Any], **more: Any) -> SamplingParams:
    """Return what `body` says, and where it says nothing what `defaults`, the model's, do."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if isinstance(body, Generation):
        _at_most("n", body.n, options.max_n)
        more.update(
            n=body.n,
            seed=body.seed,
            stop=body.stop,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=_biases(body.logit_bias),
        )
    return SamplingParams(
        **{**defaults, **chosen},
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=body.stop_token_ids,
        skip_special_tokens=body.skip_special_tokens,
        include_stop_str_in_output=body.include_stop_str_in_output,
        **more,
    )


def _structured(form: ResponseFormat | None, extra: StructuredOutputs | None) -> StructuredOutputsParams | None:
    given = None
    if form is not None and form.type == "json_object":
        given = StructuredOutputsParams(json_object=True)
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format is json_schema without one", param="response_format.json_schema")
        given = StructuredOutputsParams(json=form.json_schema.schema_)
    if extra is None:
        return given
    if given is not None:
        raise ApiError(400, "give response_format or structured_outputs, not both", param="structured_outputs")
    return StructuredOutputsParams(
        json=extra.json_,
        regex=extra.regex,
        choice=extra.choice,
        grammar=extra.grammar,
        json_object=extra.json_object,
    )


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    wrong = [token for token in given if not re.fullmatch("[0-9]{1,9}", token)]
    if wrong:
        raise ApiError(400, f"logit_bias has {wrong[0]!r}; its keys are numbers of tokens", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ApiError(400, f"{name} is {value}; this server allows {limit} at most", param=name, code="invalid_value")
