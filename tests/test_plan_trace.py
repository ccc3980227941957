"""Traces: compact and whole, and synthetic ones that have the statistics they are said to have."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ktcompile.plan.profile import Phase
from ktcompile.plan.synthetic import KINDS, Traffic, generate
from ktcompile.plan.trace import Trace

SMALL = Traffic("stationary", 3, 16, 2, requests=4, prompt=64, answer=20, longest_answer=40)


def some_trace(seed=0):
    rows = np.random.default_rng(seed).poisson(0.6, (5, 2, 8))
    return Trace.of_counts(rows, [1, 1, 40, 1, 1], [False, False, True, False, False])


def same(a, b):
    names = ("num_layers", "num_experts", "offsets", "experts", "rows", "tokens", "prefill")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


@given(
    arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)), elements=st.integers(0, 70000))
)
def test_counts_come_back(rows):
    steps = len(rows)
    trace = Trace.of_counts(rows, np.ones(steps), np.zeros(steps))
    np.testing.assert_array_equal(trace.counts(0, steps), rows)
    np.testing.assert_array_equal(trace.counts(steps - 1, steps), rows[-1:])
    assert len(trace.experts) == np.count_nonzero(rows)


def test_intervals_end_at_prefills_and_after_so_many_steps():
    assert list(some_trace().runs(1)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(some_trace().runs(9)) == [(0, 2), (2, 3), (3, 5)]


def test_a_profile_of_a_trace_has_its_counts():
    trace = some_trace()
    profile = trace.profile()
    np.testing.assert_array_equal(profile.rows(Phase.PREFILL), trace.counts(2, 3)[0])
    decode = trace.counts(0, 5)[[0, 1, 3, 4]]
    np.testing.assert_array_equal(profile.touched(Phase.DECODE), (decode > 0).sum(0))
    assert (profile.tokens(Phase.DECODE), profile.tokens(Phase.PREFILL)) == (4, 40)


def test_files_hold_all_and_damaged_ones_are_refused(tmp_path, monkeypatch):
    path, trace = tmp_path / "trace.npz", some_trace()
    trace.save(path)
    assert same(trace, Trace.load(path))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a routing trace"):
            Trace.load(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match="is not a routing trace"):
        Trace.load(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="cannot be written"):
        trace.save(tmp_path / "missing" / "trace.npz")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        trace.save(tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_layers": 0}, "cannot be"),
        ({"num_layers": 3}, "offsets do not fit"),
        ({"num_experts": 2}, "ids must be 0 to 1"),
        ({"prefill": np.zeros(4, bool)}, "do not fit"),
        ({"rows": np.zeros(0, np.uint32)}, "do not fit"),
        ({"tokens": np.zeros(5, np.int64)}, "no tokens"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(changes, what):
    with pytest.raises(ValueError, match=what):
        replace(some_trace(), **changes)


def test_offsets_and_counts_are_checked():
    trace = some_trace()
    for offsets in (trace.offsets + 1, trace.offsets[::-1].copy(), trace.offsets * 0):
        with pytest.raises(ValueError, match="offsets do not ascend"):
            replace(trace, offsets=offsets)
    with pytest.raises(ValueError, match="at least 1"):
        replace(trace, rows=trace.rows * 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_has_its_experts_and_seeds_repeat(kind, batch):
    traffic = replace(SMALL, kind=kind, batch=batch)
    trace = generate(traffic, 5)
    assert same(trace, generate(traffic, 5))
    assert not same(trace, generate(traffic, 6))
    rows = trace.counts(0, trace.num_steps)[~trace.prefill]
    assert (rows.sum(2) == 2 * trace.tokens[~trace.prefill, None]).all()
    assert rows.max() <= batch and trace.tokens[~trace.prefill].max() == batch
    assert trace.prefill.sum() == 4


def similarity(kind):
    """Correlation of the counts of successive prompts, and of the first and the last."""
    traffic = Traffic(kind, 2, 64, 8, requests=40, answer=1, prompt=3000, prompt_spread=0.0, lasts=10, forgets=8)
    trace = generate(traffic, 1)
    prompts = trace.counts(0, trace.num_steps)[trace.prefill].reshape(40, -1)
    each = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(prompts)]
    return np.array(each), np.corrcoef(prompts[0], prompts[-1])[0, 1]


def test_kinds_differ_in_how_popularity_changes():
    steady, far = similarity("stationary")
    assert steady.min() > 0.95 and far > 0.95
    slow, far = similarity("drift")
    assert 0.6 < np.median(slow) < 0.98 and slow.min() > 0.4 and far < 0.6
    abrupt, _ = similarity("topics")
    assert np.median(abrupt) > 0.95 and abrupt.min() < 0.4


def test_popularity_follows_the_exponent():
    traffic = Traffic("stationary", 1, 512, 10, requests=1, prompt=4096, prompt_spread=0, lasting=0.0, layer_spread=0.0)
    counts = np.sort(generate(traffic, 0).counts(0, 1)[0, 0])[::-1]
    law = np.arange(1.0, 513.0) ** -0.7
    assert counts[:51].sum() / counts.sum() == pytest.approx(law[:51].sum() / law.sum(), abs=0.03)


def test_rare_experts_are_rare_for_every_subject():
    traffic = Traffic("topics", 2, 64, 4, requests=8, lasts=1.0, changing=0.1, lasting=0.0)
    shares = []
    for rare in (0.0, 1.5):
        rows = np.sort(generate(replace(traffic, rare=rare), 0).profile().rows(Phase.PREFILL), axis=1)
        shares.append(rows[:, :6].sum() / rows.sum())
    assert shares[1] < 0.3 * shares[0]


def test_traffic_that_cannot_be_is_refused():
    for wrong, what in (
        ({"kind": "waves"}, "unknown; there are stationary"),
        ({"top_k": 17}, "top_k is 17"),
        ({"requests": 0}, "requests is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"lasts": 0.5}, "one request"),
    ):
        with pytest.raises(ValueError, match=what):
            replace(SMALL, **wrong)
