"""The choice of next tokens.

A row's result depends on its own logits, parameters, seed and number of tokens, bit for bit, and on no other row: each
is computed by itself, and its random number is a function of seed, stream and position. In this order, which is vLLM's:

1. log-probabilities that are reported: of the logits as they are
2. tokens that the grammar does not allow, and end tokens before min_tokens, are excluded; logit_bias
3. repetition_penalty, frequency_penalty, presence_penalty
4. temperature; 0 takes the likeliest token
5. min_p, top_k, top_p, each of what the one before it left
6. one draw from what is left, by its cumulative probabilities in the order of tokens

Where values are equal the token with the lowest number counts as the likelier, in each of these.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktcompile.engine.outputs import Logprob, Logprobs
from ktcompile.engine.philox import uniform
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.structured import Grammar

Row = NDArray[np.float64]
Tokens = NDArray[np.int64]


class NotFiniteError(ArithmeticError):
    """Logits from which no token can be chosen. rows: their numbers; all others could be sampled without them."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"the largest logit of rows {rows} is not finite, so no token can be chosen")
        self.rows = rows


class Sampled(NamedTuple):
    """A token that was chosen. logprobs: of it and of the likeliest ones, where they were asked for."""

    token_id: int
    logprobs: Logprobs | None = None


class SamplingState:
    """What the next token of a sequence depends on apart from its logits: its parameters and what it has so far.

    end_tokens: the model's, if they end it. stream: of the random numbers of one seed; the number of the answer where
    there are several. grammar: of this sequence alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        end_tokens: Iterable[int] = (),
        stream: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.stream = stream
        self.num_tokens = 0
        self.grammar = grammar
        self._min_tokens = params.min_tokens
        self._ends = np.array(sorted({*params.stop_token_ids, *end_tokens}), dtype=np.int64)
        biases = params.logit_bias or {}
        self._biased = np.array(list(biases), dtype=np.int64)
        self._biases = np.array(list(biases.values()), dtype=np.float64)
        self._repeats = params.repetition_penalty != 1
        self._counted = bool(params.frequency_penalty or params.presence_penalty)
        changes = self._repeats or self._counted or biases or grammar is not None
        self._greedy = params.temperature == 0 and not changes
        # Tokens of prompt and answer, and how often the answer has each of its own.
        self._seen = dict.fromkeys(prompt_ids if self._repeats else ())
        self._counts: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """Note that the sequence has one more token."""
        self.num_tokens += 1
        if self.grammar is not None:
            self.grammar.add(token)
        if self._repeats:
            self._seen[token] = None
        if self._counted:
            self._counts[token] += 1

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is the one with the largest logit, as logits come from the model."""
        return self._greedy and self.num_tokens >= self._min_tokens

    def adjust(self, logits: Row) -> None:
        """Change a row by what does not depend on the other tokens' logits: steps 2 and 3."""
        params = self.params
        allowed = None if self.grammar is None else self.grammar.allowed(len(logits))
        if allowed is not None:
            np.putmask(logits, ~allowed, -np.inf)
        if self.num_tokens < params.min_tokens:
            ends = self._ends[self._ends < len(logits)]
            kept = logits[ends]
            logits[ends] = -np.inf
            if self.grammar is not None and logits.max() == -np.inf:
                logits[ends] = kept  # the grammar allows nothing else
        logits[self._biased] += self._biases
        if self._repeats:
            seen = np.fromiter(self._seen, dtype=np.int64)
            penalty = params.repetition_penalty
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float64)
            logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Return the next token of each sequence. logits: [R, V], any float type; no state is changed: `add` the tokens.

    NotFiniteError: the largest logit of a row is NaN or infinite.
    """
    # What a step of decode does here is not in the processor's caches, so each operation costs more than its work.
    rows = logits if logits.dtype == torch.float32 else logits.float()
    values = rows.numpy(force=not rows.is_cpu)
    cells = values.data
    assert values.ndim == 2 and values.shape[0] == len(states), f"{len(states)} states for logits {values.shape}"
    scratch: Row | None = None  # for all rows: memory that is new costs as much as what is done in it
    found: list[Sampled] = []
    wrong: list[int] = []
    for i, likeliest in enumerate(values.argmax(-1).tolist()):  # NaN where there is one
        state, token = states[i], likeliest if math.isfinite(cells[i, likeliest]) else None
        if token is not None and not state.takes_largest:
            scratch = np.empty(values.shape[1]) if scratch is None else scratch
            scratch[:] = values[i]
            token = _choose(scratch, state)
        if token is None:
            wrong.append(i)
            continue
        count = state.params.logprobs
        found.append(Sampled(token, None if count is None else token_logprobs(rows[i], token, count)))
    if wrong:
        raise NotFiniteError(wrong)
    return found


def token_logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    """Return the log-probability of a token, first, and of the `count` likeliest ones. logits: [V]; count: -1 for all.

    The rank of the token, where it is not among these, counts those that are as likely.
    """
    values = logits.detach().float().cpu().log_softmax(-1).numpy()
    result = {token: Logprob(float(values[token]), int(np.count_nonzero(values >= values[token])))}
    top = largest(values, len(values) if count == -1 else count)
    for rank, other in enumerate(top[np.argsort(-values[top], kind="stable")], 1):
        result[int(other)] = Logprob(float(values[other]), rank)
    return result


def prompt_logprobs(logits: Tensor, prompt_ids: Sequence[int], count: int) -> list[Logprobs | None]:
    """Return `token_logprobs` of each token of a prompt, None for the first. logits: [len(prompt_ids), V]."""
    rows = zip(logits[:-1], prompt_ids[1:], strict=True)
    return [None, *(token_logprobs(row, token, count) for row, token in rows)]


def largest(values: NDArray[np.floating], count: int) -> Tokens:
    """Return where the `count` largest of some values are, ascending; the first ones where values are equal."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.arange(0)
    return _down_to(values, np.partition(values, -count)[-count], count)


def _down_to(values: NDArray[np.floating], least: np.floating, count: int) -> Tokens:
    """Return where the `count` largest are, of which `least` is the last, ascending."""
    places = np.flatnonzero(values >= least)
    if len(places) == count:
        return places
    equal = np.flatnonzero(values[places] == least)
    return np.delete(places, equal[count - len(places) :])


def _choose(logits: Row, state: SamplingState) -> int | None:
    """Return the next token, None if the largest logit is not finite any more. logits: are overwritten."""
    state.adjust(logits)
    params, maximum = state.params, logits.max()
    if not math.isfinite(maximum):
        return None
    if params.temperature == 0:
        return int(logits.argmax())
    logits -= maximum  # so that the largest stays finite however small the temperature is
    if params.temperature != 1:
        with np.errstate(over="ignore"):
            logits /= params.temperature
    tokens: Tokens | None = None  # all
    if params.min_p > 0:
        tokens = np.flatnonzero(logits >= math.log(params.min_p))
        logits = logits[tokens]
    if 0 < params.top_k < len(logits):
        tokens, logits = _take(tokens, logits, largest(logits, params.top_k))
    # torch takes half of numpy's time for the exponential and a third for the sums, in the same order.
    weights = torch.from_numpy(logits).exp_().numpy()
    if params.top_p < 1:
        tokens, weights = _take(tokens, weights, _nucleus(weights, params.top_p))
    sums = torch.from_numpy(weights).cumsum_(0).numpy()
    drawn = uniform(state.seed, state.stream, state.num_tokens) * sums[-1]
    place = int(sums.searchsorted(drawn, side="right"))
    return place if tokens is None else int(tokens[place])


def _take(tokens: Tokens | None, values: Row, places: Tokens) -> tuple[Tokens, Row]:
    return (places if tokens is None else tokens[places]), values[places]


def _nucleus(weights: Row, top_p: float) -> Tokens:
    """Return where the fewest weights are that together have the part `top_p` of their sum, ascending.

    A weight belongs to them if those before it, in descending order, have less.
    """
    total = weights.sum()
    # All weights below this have together less than half of what may be left out, so none of them belongs to the
    # nucleus. Of a model's they are nearly all, and need not be sorted.
    low = 0.5 * (1 - top_p) * total / len(weights)
    descending = np.sort(weights[weights >= low])[::-1]
    # The first is always among them; another one is if the sum up to the one before it does not suffice.
    count = 1 + int(np.count_nonzero(descending.cumsum()[:-1] < top_p * total))
    return _down_to(weights, descending[count - 1], count)
