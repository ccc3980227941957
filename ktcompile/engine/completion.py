"""One answer while it is generated: its tokens, its text, and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ktcompile.engine.detokenizer import Decoder, IncrementalText, decode
from ktcompile.engine.outputs import CompletionOutput, FinishReason, Logprobs
from ktcompile.engine.sampler import Sampled, SamplingState
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.stop_texts import StopTexts
from ktcompile.engine.structured import Grammar


class Completion:
    """Takes the tokens of an answer one by one, and says after each whether it goes on.

    end_tokens: the model's. limit: tokens at most, params.max_tokens or what positions allow. index: its number among
    the answers of a request. state: what its next token is sampled with.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Decoder,
        prompt_ids: Sequence[int],
        end_tokens: Iterable[int],
        limit: int,
        index: int = 0,
    ) -> None:
        ends = frozenset(() if params.ignore_eos else end_tokens)
        grammar = None if params.structured_outputs is None else Grammar(params.structured_outputs, tokenizer)
        self.state = SamplingState(params, prompt_ids, ends, stream=index, grammar=grammar)
        self._params = params
        self._tokenizer = tokenizer
        self._ends = ends
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._limit = limit
        self._index = index
        self._incremental = IncrementalText(tokenizer, prompt_ids, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopTexts(params.stop_texts)
        # Nothing but a token or the limit ends it, and its text is sure as it comes.
        self._plain = not params.stop_texts and grammar is None
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def add(self, sampled: Sampled) -> str:
        """Take the next token, and return the text that is sure with it: no later one changes it or ends before it."""
        assert self.finish_reason is None, "the answer has ended"
        token, before = sampled.token_id, len(self._pieces)
        self._token_ids.append(token)
        self.state.add(token)
        if sampled.logprobs is not None:
            self._note_logprobs(token, sampled.logprobs)
        ends = token in self._ends or token in self._stop_tokens
        if self._plain and not ends and len(self._token_ids) < self._limit:  # nearly always
            text = self._incremental.add(token)
            self._pieces.append(text)
            return text
        may_stop = len(self._token_ids) > self._params.min_tokens
        if may_stop and ends:
            if self._params.include_stop_str_in_output:
                self._take(self._incremental.add(token), may_stop)
            self._end("stop", None if token in self._ends else token)
        else:
            self._take(self._incremental.add(token), may_stop)
            if self.finish_reason is None and self.state.grammar is not None and self.state.grammar.ended:
                self._end("stop")
            if self.finish_reason is None and len(self._token_ids) == self._limit:
                self._end("length")
        return "".join(self._pieces[before:])

    @property
    def last_logprobs(self) -> list[Logprobs] | None:
        """Those of the newest token, one; None: they were not asked for."""
        return self._logprobs[-1:] if self._params.logprobs is not None else None

    def end(self, reason: FinishReason) -> str:
        """End an answer that has not ended by itself, and return the text that was held back."""
        before = len(self._pieces)
        if self.finish_reason is None:
            self._end(reason)
        return "".join(self._pieces[before:])

    def output(self) -> CompletionOutput:
        """Return the answer as it is now."""
        asked = self._params.logprobs is not None
        return CompletionOutput(
            self._index,
            "".join(self._pieces),
            self._token_ids.copy(),
            cumulative_logprob=self._cumulative_logprob if asked else None,
            logprobs=self._logprobs.copy() if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _take(self, text: str, may_stop: bool) -> None:
        if not may_stop:  # a stop text has no part in it
            self._pieces.append(text)
            return
        sure, stop = self._stops.add(text)
        self._pieces.append(sure)
        if stop is not None:
            self._pieces += [stop] if self._params.include_stop_str_in_output else []
            self.finish_reason, self.stop_reason = "stop", stop

    def _end(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        """Pass on what is held back, unless it completes a stop text."""
        if self.finish_reason is None:
            self._take(self._incremental.end(), may_stop=len(self._token_ids) > self._params.min_tokens)
        if self.finish_reason is None:
            self._pieces.append(self._stops.end())
            self.finish_reason, self.stop_reason = reason, stop_reason

    def _note_logprobs(self, token: int, logprobs: Logprobs) -> None:
        self._cumulative_logprob += logprobs[token].logprob
        self._logprobs.append(with_texts(self._tokenizer, logprobs))


def with_texts(tokenizer: Decoder, logprobs: Logprobs) -> Logprobs:
    """Return log-probabilities with the text of each token."""
    return {
        token: replace(logprob, decoded_token=decode(tokenizer, [token], skip_special_tokens=False))
        for token, logprob in logprobs.items()
    }
