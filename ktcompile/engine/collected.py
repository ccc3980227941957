"""A request's record, out of what comes step by step."""

from __future__ import annotations

from collections.abc import Sequence

from ktcompile.engine.engine import Delta
from ktcompile.engine.outputs import CompletionOutput, FinishReason, Logprobs, RequestOutput
from ktcompile.engine.sampling_params import SamplingParams


class Collected:
    """Takes the deltas of one request; `output` is what they make up so far."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._answers = [_Answer(params.logprobs is not None) for _ in range(params.n)]
        self._prompt_logprobs: list[Logprobs | None] | None = None
        self._num_cached_tokens = 0

    def add(self, delta: Delta) -> None:
        """Take the next one."""
        self._answers[delta.index].add(delta)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if delta.index == 0:
            self._num_cached_tokens = delta.num_cached_tokens

    def output(self) -> RequestOutput:
        """Return the request with its answers as they are now."""
        outputs = [answer.output(index) for index, answer in enumerate(self._answers)]
        finished = all(output.finish_reason is not None for output in outputs)
        return RequestOutput(
            self._request_id,
            self._prompt,
            self._prompt_token_ids,
            outputs,
            finished,
            self._prompt_logprobs,
            self._num_cached_tokens,
        )


class _Answer:
    def __init__(self, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self._pieces.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs or ()
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason

    def output(self, index: int) -> CompletionOutput:
        logprobs = self._logprobs.copy() if self._with_logprobs else None
        total = sum(p[t].logprob for p, t in zip(self._logprobs, self._token_ids, strict=True)) if logprobs else 0.0
        return CompletionOutput(
            index,
            "".join(self._pieces),
            self._token_ids.copy(),
            cumulative_logprob=total if self._with_logprobs else None,
            logprobs=logprobs,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )
