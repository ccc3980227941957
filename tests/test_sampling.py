"""Sampling: parameters that are refused, each rule against a plain reference, and rows that do not know each other."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.engine.outputs import Logprob
from ktcompile.engine.philox import philox, uniform
from ktcompile.engine.sampler import (
    NotFiniteError,
    SamplingState,
    largest,
    prompt_logprobs,
    sample,
    token_logprobs,
)
from ktcompile.engine.sampling_params import SamplingParams

VOCABULARY = 24


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more, or None"),
        ({"temperature": -1}, "temperature is -1; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 1.1}, "min_p is 1.1; it must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be between -2 and 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be at most max_tokens, 16"),
        ({"n": 0}, "n is 0; it must be 1 or more"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2"),
        ({"seed": 1 << 64}, "an integer of 64 bits"),
        ({"stop": ["a", ""]}, "stop is ['a', '']; an empty text would end every answer"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids is [5, -1]; tokens are numbered from 0 on"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias has inf for token 3"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias has 1.0 for token -3"),
    ],
)
def test_parameters_out_of_range_are_refused(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SamplingParams(**given)


def test_a_bias_is_of_a_token_of_the_model():
    params = SamplingParams(logit_bias={7: 1.0})
    params.check_vocabulary(8)
    with pytest.raises(ValueError, match="logit_bias has token 7; the model's tokens are 0 to 6"):
        params.check_vocabulary(7)


words = st.integers(0, (1 << 64) - 1)


def numpy_words(counter: int, key: tuple[int, int]) -> list[int]:
    # numpy counts before it draws.
    before = (counter - 1) % (1 << 256)
    parts = np.array([before >> (64 * i) & ((1 << 64) - 1) for i in range(4)], dtype=np.uint64)
    return np.random.Philox(counter=parts, key=np.array(key, dtype=np.uint64)).random_raw(4).tolist()


@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_random_words_are_those_of_numpy(counter, key):
    assert list(philox(counter, key)) == numpy_words(sum(word << (64 * i) for i, word in enumerate(counter)), key)


def test_random_numbers_depend_on_seed_stream_and_position():
    keys = [(seed, stream, position) for seed in (0, 1, -1) for stream in range(3) for position in range(200)]
    numbers = [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0 and max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.03 and abs(np.var(numbers) - 1 / 12) < 0.01
    assert uniform(-1, 0, 0) == uniform((1 << 64) - 1, 0, 0)


def reference(logits, params, prompt, answer, ends) -> int:
    """Return the next token by the rules of the module, token by token. All arguments but `params` are lists."""
    x = list(logits)
    if len(answer) < params.min_tokens:
        for token in {*ends, *params.stop_token_ids}:
            x[token] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *answer}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(answer):
        x[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return order[0]
    scaled = torch.tensor([(value - max(x)) / params.temperature for value in x], dtype=torch.float64)
    weight = scaled.exp().tolist()
    kept = [token for token in order if params.min_p == 0 or scaled[token] >= math.log(params.min_p)]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        total = math.fsum(weight[token] for token in kept)
        before = [math.fsum(weight[token] for token in kept[:i]) for i in range(len(kept))]
        kept = [token for token, mass in zip(kept, before, strict=True) if mass < params.top_p * total]
    (word, *_) = numpy_words(len(answer), (params.seed, 0))
    left = (word >> 11) / 2**53 * math.fsum(weight[token] for token in kept)
    for token in sorted(kept):
        left -= weight[token]
        if left < 0:
            return token
    raise AssertionError("nothing was drawn")


# Multiples of a half, so that many are equal.
rows = st.lists(st.integers(-12, 12).map(lambda i: i / 2), min_size=VOCABULARY, max_size=VOCABULARY)
tokens = st.integers(0, VOCABULARY - 1)
FEATURES = {
    "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    "top_k": st.sampled_from([-1, 0, 1, 2, 5, 23, 24, 100]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-9]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    "presence_penalty": st.sampled_from([0.0, 1.5, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.5, -0.5]),
    "logit_bias": st.none() | st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 0.25, 100.0]), max_size=4),
    "min_tokens": st.integers(0, 4),
    "stop_token_ids": st.lists(tokens, max_size=3),
}
sequences = st.fixed_dictionaries(
    {
        "logits": rows,
        "params": st.builds(SamplingParams, seed=words, **FEATURES),
        "prompt": st.lists(tokens, min_size=1, max_size=6),
        "answer": st.lists(tokens, max_size=6),
        "ends": st.lists(tokens, max_size=2),
    }
)


def state_of(sequence) -> SamplingState:
    state = SamplingState(sequence["params"], sequence["prompt"], sequence["ends"])
    for token in sequence["answer"]:
        state.add(token)
    return state


@settings(max_examples=400)
@given(batch=st.lists(sequences, min_size=1, max_size=4))
def test_tokens_are_those_of_the_reference(batch):
    logits = torch.tensor([sequence["logits"] for sequence in batch])
    found = sample(logits, [state_of(sequence) for sequence in batch])
    assert [each.token_id for each in found] == [reference(**sequence) for sequence in batch]


# One feature after the other, so that each is seen by itself and at sizes at which libraries change their ways.
ALONE = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {5: 3.0}, "min_tokens": 3, "stop_token_ids": [2]},
    {},
    {"temperature": 0.3},
    {"top_k": 50},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"top_k": 200, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 1.4},
]


@pytest.mark.parametrize("vocabulary", [1000, 32_003, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_knows_nothing_of_the_others(vocabulary, dtype, threads):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(len(ALONE), vocabulary, generator=generator)).to(dtype)

    def states():
        made = [SamplingState(SamplingParams(seed=9, logprobs=5, **given), [1, 2, 3]) for given in ALONE]
        for state in made:
            for token in (7, 8, 7):
                state.add(token)
        return made

    torch.set_num_threads(1)
    alone = [sample(logits[i : i + 1].clone(), [state])[0] for i, state in enumerate(states())]
    for number in (1, 2):
        torch.set_num_threads(number)
        assert sample(logits, states()) == alone
        order = [3, 0, 9, 5, 1, 8, 2, 7, 6, 4]
        assert sample(logits[order], [states()[i] for i in order]) == [alone[i] for i in order]
        some = slice(2, 7)
        assert sample(logits.T.contiguous().T[some], states()[some]) == alone[some]


def drawn(logits: torch.Tensor, count: int, **given) -> list[int]:
    """Return the tokens of an answer whose logits are always the same."""
    state = SamplingState(SamplingParams(**given))
    result = []
    for _ in range(count):
        result.append(sample(logits[None], [state])[0].token_id)
        state.add(result[-1])
    return result


def test_top_p_draws_from_the_likeliest_tokens_alone():
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    for top_p, expected in ((0.4, {1}), (0.7, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert set(drawn(logits, 300, top_p=top_p, seed=0)) == expected


@pytest.mark.parametrize("given", [{}, {"top_k": 3}, {"top_p": 0.9999999}, {"min_p": 1e-9}])
def test_draws_follow_the_probabilities_at_any_temperature(given):
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    counts = torch.bincount(torch.tensor(drawn(logits, 4000, temperature=0.5, seed=0, **given)), minlength=3)
    expected = torch.tensor([0.01, 0.36, 0.09]) / 0.46
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)
    assert drawn(logits * 1e4, 1, temperature=1e-300, seed=0, **given) == [1]


def test_draws_over_a_large_vocabulary_follow_the_probabilities():
    """By the cumulative distribution, which a wrong order or a lost tail would shift."""
    logits = 2 * torch.randn(50_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cumulative = logits.float().double().softmax(0).cumsum(0)
    places = cumulative[torch.tensor(drawn(logits, 1500, seed=3))].sort().values
    assert (places - torch.linspace(0, 1, 1500)).abs().max() < 0.045  # Kolmogorov and Smirnov, 0.5 %


def test_a_seed_repeats_itself_and_streams_differ():
    logits = torch.zeros(1000)
    assert drawn(logits, 9, seed=5) == drawn(logits, 9, seed=5) != drawn(logits, 9, seed=6)
    assert drawn(logits, 9) != drawn(logits, 9)
    streams = [SamplingState(SamplingParams(seed=5), stream=stream) for stream in range(4)]
    assert len({each.token_id for each in sample(torch.zeros(4, 1000), streams)}) == 4


def test_ties_go_to_the_lowest_token():
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 2.0])
    assert drawn(logits, 1, temperature=0.0) == [1]
    assert set(drawn(logits, 200, top_k=2, seed=0)) == {1, 3}
    assert set(drawn(logits, 200, top_k=4, seed=0, temperature=3.0)) == {1, 2, 3, 4}
    assert set(drawn(torch.zeros(6), 200, top_p=0.5, seed=0)) == {0, 1, 2}


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=20), count=st.integers(0, 22))
def test_the_largest(values, count):
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert largest(np.array(values, dtype=np.float32), count).tolist() == sorted(order[:count])


def test_no_end_before_min_tokens():
    logits = torch.tensor([0.0, 9.0, 8.0, 1.0])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[2, 10**6])
    state = SamplingState(params, [1], end_tokens=[1])
    found = []
    for _ in range(3):
        found.append(sample(logits[None], [state])[0].token_id)
        state.add(found[-1])
    assert found == [3, 3, 1]


def test_logprobs_are_those_of_the_logits_as_they_are():
    logits = torch.tensor([[0.5, 2.0, 2.0, -1.0, 1.0]])
    state = SamplingState(SamplingParams(temperature=0.0, logprobs=2, logit_bias={3: 100.0}))
    (found,) = sample(logits, [state])
    expected = logits[0].log_softmax(0).tolist()
    assert found.token_id == 3
    assert found.logprobs == {3: Logprob(expected[3], 5), 1: Logprob(expected[1], 1), 2: Logprob(expected[2], 2)}
    assert list(token_logprobs(logits[0], 2, 1)) == [2, 1]
    # As likely as another: counted with it where it is not among the likeliest, as in vLLM.
    assert token_logprobs(logits[0], 2, 0) == {2: Logprob(expected[2], 2)}
    assert sorted(p.rank for p in token_logprobs(logits[0], 2, -1).values()) == [1, 2, 3, 4, 5]
    assert sample(logits, [SamplingState(SamplingParams())])[0].logprobs is None


def test_logprobs_of_a_prompt():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    found = prompt_logprobs(logits, [3, 1, 4, 1], 2)
    assert found[0] is None
    for position, token in ((1, 1), (2, 4), (3, 1)):
        assert found[position] == token_logprobs(logits[position - 1], token, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_largest_logit_is_named(bad, temperature):
    logits = torch.zeros(3, 8)
    logits[1] = bad if bad == -math.inf else logits[1]
    logits[1, 5] = bad
    states = [SamplingState(SamplingParams(temperature=temperature, seed=1)) for _ in range(3)]
    with pytest.raises(NotFiniteError, match=r"rows \[1\] is not finite") as caught:
        sample(logits, states)
    assert caught.value.rows == [1]


def test_a_row_of_which_nothing_may_be_chosen_is_named():
    state = SamplingState(SamplingParams(min_tokens=1, stop_token_ids=[0, 1]))
    with pytest.raises(NotFiniteError):
        sample(torch.zeros(1, 2), [state])
