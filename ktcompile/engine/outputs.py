"""What a request is answered with. Names and meanings are those of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "stop": at a token or a text that ends an answer. "length": at max_tokens, or where the model's positions end.
# "abort": it was cancelled. "timeout": at its deadline. "error": it could not go on.
FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was. rank: 1 for the likeliest. decoded_token: its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


# By token: of the one that was chosen, and of others.
Logprobs = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """An answer. token_ids: all that were generated, that which ended it included. text: without what ended it.

    cumulative_logprob, logprobs: of its tokens, the sum and one for each; None: they were not asked for.
    finish_reason: why it ended; None: it has not. stop_reason: the text or the token of the request's that ended it;
    None: another reason, or a token of the model's.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request with its answers. prompt: its text; None: it was given as tokens.

    prompt_logprobs: one for each token of the prompt, None for the first; None: they were not asked for.
    num_cached_tokens: of the prompt, those that were not computed since another request had; of the first answer.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
