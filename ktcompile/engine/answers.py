"""Requests while an engine serves them, and what each step adds to their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ktcompile.engine.completion import Completion
from ktcompile.engine.outputs import FinishReason, Logprobs
from ktcompile.engine.sampler import token_logprobs
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.batch import Chunk


class Delta(NamedTuple):
    """What a step added to one answer of a request.

    index: which answer. text: what became sure of it. token_ids: of all new tokens, that which ends the answer
    included. logprobs: one for each of these; None: they were not asked for. finish_reason, stop_reason: as of
    `ktcompile.engine.outputs.CompletionOutput`. prompt_logprobs: with the first delta of answer 0, if asked for.
    num_cached_tokens: of the prompt, those that this answer did not compute when it began.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[Logprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request whose answers have not all ended. answers: those, by the name that the scheduler knows."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Answer:
    """One answer. name: as the scheduler knows it. of_prompt: what was asked for of the prompt's tokens behind the
    first, as far as it is known."""

    request: ServedRequest
    name: str
    completion: Completion
    index: int
    began: bool = False
    num_cached_tokens: int = 0
    of_prompt: list[Logprobs] = field(default_factory=list)

    def note_prompt(self, chunk: Chunk, logits: Tensor) -> None:
        """Take the logits of [chunk.logits_from, chunk.end)."""
        count, prompt_ids = self.request.params.prompt_logprobs, self.request.prompt_ids
        if self.index != 0 or self.began or count is None:
            return
        followers = prompt_ids[chunk.logits_from + 1 : chunk.end + 1]
        self.of_prompt += [token_logprobs(row, token, count) for row, token in zip(logits, followers, strict=False)]

    def delta(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: list[Logprobs] | None,
        of_prompt: list[Logprobs | None] | None = None,
    ) -> Delta:
        return Delta(
            self.request.request_id,
            self.index,
            text,
            token_ids,
            logprobs,
            self.completion.finish_reason,
            self.completion.stop_reason,
            len(self.request.prompt_ids),
            of_prompt,
            self.num_cached_tokens,
        )
