"""Requests while an engine serves them, and what each step adds to their answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ktcompile.engine.completion import Completion
from ktcompile.engine.outputs import FinishReason, Logprobs
from ktcompile.engine.receipt import Receipt
from ktcompile.engine.sampler import token_logprobs
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.batch import Chunk


@dataclass(slots=True)  # nobody changes one, but a frozen one takes five times as long to make
class Delta:
    """What a step added to one answer of a request.

    index: which answer. text: what became sure of it. token_ids: of all new tokens, that which ends the answer
    included. logprobs: one for each of these; None: they were not asked for. finish_reason, stop_reason: as of
    `ktcompile.engine.outputs.CompletionOutput`. prompt_logprobs: with the first delta of answer 0, if asked for.
    num_cached_tokens: of the prompt, those that this answer did not compute when it began. receipt: where they came
    from; None: it did not begin.
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
    receipt: Receipt | None = None


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request whose answers have not all ended. answers: those, by the name that the scheduler knows."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Answer:
    """One answer. name: as the scheduler knows it. asks_prompt: log-probabilities of the tokens of the prompt are
    wanted with its first delta. of_prompt: those of the tokens behind the first, as far as they are known."""

    request: ServedRequest
    name: str
    completion: Completion
    index: int
    asks_prompt: bool = False
    began: bool = False
    num_cached_tokens: int = 0
    receipt: Receipt | None = None
    of_prompt: list[Logprobs] = field(default_factory=list)

    def note_prompt(self, chunk: Chunk, logits: Tensor) -> None:
        """Take the logits of [chunk.logits_from, chunk.end)."""
        count, prompt_ids = self.request.params.prompt_logprobs, self.request.prompt_ids
        assert self.asks_prompt and count is not None
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
            self.receipt,
        )
