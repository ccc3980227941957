"""Routing profiles: what they count, how they forget, and files that are whole or refused."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.plan.profile import Phase, RoutingProfile, merged

FORMATS = ("profile.json", "profile.npz")


def some_profile(seed=0, shape=(3, 8), half_life=100.0):
    rng = np.random.default_rng(seed)
    profile = RoutingProfile(*shape, half_life)
    for step in range(20):
        tokens = 1 if step % 2 else 16
        ids = np.argsort(rng.random((shape[0], tokens, shape[1])), axis=2)[:, :, :2]
        profile.record(ids, Phase.DECODE if tokens == 1 else Phase.PREFILL)
    return profile


def equal(a, b):
    return all(
        np.allclose(a.rows(p), b.rows(p))
        and np.allclose(a.touched(p), b.touched(p))
        and np.isclose(a.tokens(p), b.tokens(p))
        and np.isclose(a.steps(p), b.steps(p))
        for p in Phase
    )


@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_rows_and_touched_steps_are_counted(layers, experts, tokens, seed):
    rng = np.random.default_rng(seed)
    profile, rows, touched = RoutingProfile(layers, experts), 0, 0
    for _ in range(3):
        ids = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :2]
        counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in ids])
        profile.record(ids)
        rows, touched = rows + counts, touched + (counts > 0)
    np.testing.assert_array_equal(profile.rows(Phase.DECODE), rows)
    np.testing.assert_array_equal(profile.touched(Phase.DECODE), touched)
    assert not profile.rows(Phase.PREFILL).any()
    assert (profile.tokens(Phase.DECODE), profile.steps(Phase.DECODE)) == (3 * tokens, 3)


def test_half_is_forgotten_after_a_half_life_and_nothing_overflows():
    profile = RoutingProfile(1, 2, half_life=10)
    one = np.array([[1.0, 0.0]])
    profile.record_counts(one, one, 1, 1, Phase.DECODE)
    profile.record_counts(0 * one, 0 * one, 10, 10, Phase.DECODE)
    assert profile.rows(Phase.DECODE)[0, 0] == pytest.approx(0.5)
    for _ in range(500):
        profile.record_counts(one, one, 10_000, 1, Phase.PREFILL)
    assert profile.rows(Phase.PREFILL)[0, 0] == pytest.approx(1.0)
    assert profile.rows(Phase.DECODE)[0, 0] == pytest.approx(0.0)
    profile.scale(0.0)
    assert profile.tokens(Phase.PREFILL) == 0


def test_merging_adds_counts_whatever_was_forgotten():
    a, b = some_profile(1), some_profile(2, half_life=None)
    both = merged([a, b])
    for phase in Phase:
        np.testing.assert_allclose(both.rows(phase), a.rows(phase) + b.rows(phase))
        assert both.steps(phase) == pytest.approx(a.steps(phase) + b.steps(phase))
    with pytest.raises(ValueError, match="cannot be merged"):
        a.merge(RoutingProfile(3, 9))
    with pytest.raises(ValueError, match="no profile"):
        merged([])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("half_life", [None, 50.0])
def test_files_hold_all(tmp_path, name, half_life):
    profile = some_profile(3, half_life=half_life)
    profile.save(tmp_path / name)
    again = RoutingProfile.load(tmp_path / name, (3, 8))
    assert equal(profile, again) and again.half_life == half_life
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    with pytest.raises(ValueError, match="the model has"):
        RoutingProfile.load(tmp_path / name, (3, 9))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused(tmp_path, name):
    path = tmp_path / name
    some_profile().save(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a routing profile"):
            RoutingProfile.load(path)
    with pytest.raises(FileNotFoundError):
        RoutingProfile.load(tmp_path / f"no-{name}")


def test_wrong_contents_are_refused(tmp_path):
    good = {"version": 1, "half_life": 0.0, "tokens": [1, 1], "steps": [1, 1]}
    good |= {"rows": np.ones((2, 1, 2)), "touched": np.ones((2, 1, 2))}
    for wrong, what in (
        ({"version": 9}, "version is 9"),
        ({"rows": np.ones((2, 2))}, "shapes"),
        ({"touched": np.ones((2, 1, 3))}, "shapes"),
        ({"tokens": [1]}, "totals"),
        ({"rows": -np.ones((2, 1, 2))}, "negative"),
        ({"rows": np.full((2, 1, 2), np.nan)}, "not a number"),
    ):
        np.savez(tmp_path / "wrong.npz", **{**good, **wrong})
        with pytest.raises(ValueError, match=what):
            RoutingProfile.load(tmp_path / "wrong.npz")
    np.savez(tmp_path / "less.npz", version=1)
    with pytest.raises(ValueError, match="is not a routing profile"):
        RoutingProfile.load(tmp_path / "less.npz")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="no object"):
        RoutingProfile.load(tmp_path / "list.json")


@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, name, monkeypatch):
    path = tmp_path / name
    some_profile(1).save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        some_profile(2).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [tmp_path / name]
    with pytest.raises(ValueError, match="cannot be written"):
        some_profile(2).save(tmp_path / "missing" / name)


def test_what_cannot_be_counted_is_refused():
    profile = RoutingProfile(2, 4)
    for ids, what in (
        (np.zeros((3, 1, 2), dtype=int), "has 3 layers"),
        (np.full((2, 1, 2), 4), "must be 0 to 3"),
        (np.full((2, 1, 2), -1), "must be 0 to 3"),
    ):
        with pytest.raises(ValueError, match=what):
            profile.record(ids)
    with pytest.raises(ValueError, match="have shape"):
        profile.record_counts(np.ones((2, 3)), np.ones((2, 3)), 1, 1, Phase.DECODE)
    with pytest.raises(ValueError, match="negative"):
        profile.record_counts(np.ones((2, 4)), -np.ones((2, 4)), 1, 1, Phase.DECODE)
    with pytest.raises(ValueError, match="half_life"):
        RoutingProfile(2, 4, 0)
    with pytest.raises(ValueError, match="counts nothing"):
        RoutingProfile(0, 4)
    with pytest.raises(ValueError, match="multiplied"):
        profile.scale(-1)
    profile.record(np.zeros((2, 0, 2), dtype=int))
    assert profile.steps(Phase.DECODE) == 0


def test_recording_takes_less_than_a_hundredth_of_a_step():
    profile = RoutingProfile(61, 256, 1000.0)
    ids = np.argsort(np.random.default_rng(0).random((61, 1, 256)), axis=2)[:, :, :8]
    best = np.inf
    for _ in range(200):
        start = time.perf_counter()
        profile.record(ids)
        best = min(best, time.perf_counter() - start)
    assert best < 100e-6
