"""The simulator: costs as the cost model has them, a bound that bounds, and strategies as they are said to be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.placement import SIZE, model, naive_cost, random_profile, random_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.plan.bound import lower_bound
from ktcompile.plan.hardware import PRESETS, Hardware, preset
from ktcompile.plan.interval import Interval
from ktcompile.plan.profile import RoutingProfile
from ktcompile.plan.replan import ReplanConfig
from ktcompile.plan.simulate import STRATEGIES, Setting, simulate
from ktcompile.plan.synthetic import Traffic, generate
from ktcompile.plan.table import ExpertTable
from ktcompile.plan.trace import Trace

HARDWARE = preset("4090-ddr5")
hardware = st.sampled_from(list(PRESETS.values()))
steps = st.lists(st.sampled_from([1, 2, 8]), min_size=1, max_size=6) | st.lists(
    st.sampled_from([9, 300, 3000]), min_size=1, max_size=1
)


@settings(max_examples=60, deadline=None)
@given(hardware, steps, st.integers(0, 999))
def test_an_interval_costs_what_its_experts_cost_one_by_one(machine, kinds, seed):
    facts, trace = model(6, 6), random_trace(2, 6, 2, kinds, seed)
    resident = np.random.default_rng(seed).random((2, 6)) < 0.5
    interval = Interval(trace, 0, len(kinds), ExpertTable.of(facts, machine))
    cost = interval.cost(resident)
    for step, layer in itertools.product(range(len(kinds)), range(2)):
        rows = trace.counts(step, step + 1)[0, layer]
        expected = naive_cost(machine, facts.layers[layer], rows, resident[layer])
        slot, found = step * 2 + layer, cost.layers
        got = [found.cpu[slot], found.device[slot], found.copy[slot], found.total[slot]]
        np.testing.assert_allclose(got, expected[:4], atol=1e-15)
        assert found.streamed[slot] == expected[4]
    assert cost.hits.sum() == (trace.counts(0, len(kinds)).sum(0) * resident).sum()


@settings(max_examples=60, deadline=None)
@given(hardware, steps, st.integers(0, 999), st.integers(0, 8), st.sampled_from([(1, 1), (1, 2)]))
def test_no_placement_is_faster_than_the_bound(machine, kinds, seed, room, scales):
    facts = model(4, 4, sizes=(scales[0] * SIZE, scales[1] * SIZE))
    trace = random_trace(2, 4, 2, kinds, seed)
    interval = Interval(trace, 0, len(kinds), ExpertTable.of(facts, machine))
    bound = lower_bound(interval, room * SIZE)
    best = np.inf
    for bits in itertools.product([False, True], repeat=8):
        mask = np.array(bits).reshape(2, 4)
        if (mask.sum(1) * scales).sum() <= room:
            best = min(best, *(interval.cost(mask, way).layers.total.sum() for way in ("cheaper", "split", "streamed")))
    assert bound <= best * (1 + 1e-9)
    assert bound >= 0.5 * best


@pytest.mark.parametrize("machine", PRESETS)
def test_the_bound_of_steps_that_are_alike_is_the_best_number_of_cold_experts(machine):
    facts = model(16, top_k=8)
    rows = np.zeros((5, 1, 16), dtype=np.int64)
    rows[:, :, 3:11] = 1
    interval = Interval(Trace.of_counts(rows, [1] * 5, [False] * 5), 0, 5, ExpertTable.of(facts, preset(machine)))
    best = min(interval.cost(np.arange(16)[None] < n).layers.total.sum() for n in range(3, 12))
    assert lower_bound(interval, 16 * SIZE) == pytest.approx(best)


def setting(facts, **others):
    return Setting(facts, HARDWARE, random_profile(facts, 1), **others)


@pytest.fixture(scope="module")
def drifting():
    traffic = Traffic("drift", 6, 64, 8, requests=24)
    facts = model(*(64,) * 6, top_k=8)
    profile = generate(replace(traffic, requests=48), 1001).profile()
    return facts, generate(traffic, 1), Setting(facts, HARDWARE, profile)


def by_name(results):
    return {(r.strategy, r.fraction): r for r in results}


@pytest.mark.parametrize("machine", PRESETS)
def test_nothing_passes_the_clairvoyant_bound(machine):
    facts = model(*(16,) * 3)
    trace = random_trace(3, 16, 2, [200, *[1] * 30, 1500, *[4] * 40, 9, *[1] * 5], 3)
    config = ReplanConfig(interval=16)
    for threshold in (1, 512):
        where = Setting(facts, preset(machine), random_profile(facts, 1), config, threshold)
        found = by_name(simulate(trace, where, list(STRATEGIES), [0, 0.01, 0.25, 0.5, 0.9, 1]))
        for (name, fraction), result in found.items():
            bound = found["clairvoyant", fraction]
            assert result.seconds >= bound.seconds * (1 - 1e-9), (name, fraction)
            assert result.decode_seconds >= bound.decode_seconds * (1 - 1e-9), (name, fraction)


def test_adaptive_is_no_slower_than_the_better_of_both_under_drift(drifting):
    _, trace, where = drifting
    fractions = [0.1, 0.3, 0.5, 0.7, 0.9]
    found = by_name(simulate(trace, where, ["frequency", "kt-dynamic", "adaptive", "clairvoyant"], fractions))
    for fraction in fractions:
        adaptive = found["adaptive", fraction].tokens_per_second
        others = [found[name, fraction].tokens_per_second for name in ("frequency", "kt-dynamic")]
        assert adaptive >= max(others)
        assert adaptive <= found["clairvoyant", fraction].tokens_per_second <= 1.12 * adaptive


def test_adaptive_keeps_to_a_profile_that_holds():
    traffic = Traffic("stationary", 6, 64, 8, requests=12)
    facts = model(*(64,) * 6, top_k=8)
    where = Setting(facts, HARDWARE, generate(replace(traffic, requests=48), 1001).profile())
    found = by_name(simulate(generate(traffic, 1), where, ["frequency", "adaptive"], [0.1, 0.5, 0.9]))
    for fraction in (0.1, 0.5, 0.9):
        assert found["adaptive", fraction].tokens_per_second >= 0.995 * found["frequency", fraction].tokens_per_second


def test_dynamic_updates_only_at_streamed_prompts(drifting):
    _, trace, where = drifting
    assert trace.tokens.max() > 512
    some, none = (
        by_name(simulate(trace, replace(where, kt_threshold=t), ["kt-dynamic", "kt-uniform"], [0.25]))
        for t in (512, 10**6)
    )
    assert some["kt-dynamic", 0.25].swaps > 0 and some["kt-dynamic", 0.25].moved_bytes == 0
    assert none["kt-dynamic", 0.25].swaps == 0 and none["kt-dynamic", 0.25].streamed_bytes == 0
    assert none["kt-dynamic", 0.25].seconds == none["kt-uniform", 0.25].seconds


def test_totals_add_up(drifting):
    _, trace, where = drifting
    none, half, every = simulate(trace, where, ["adaptive"], [0, 0.5, 1])
    assert none.hit_rate == 0 and every.hit_rate == 1 and 0.5 < half.hit_rate < 1
    assert half.uses.sum() == trace.rows.sum() and (half.hits <= half.uses).all()
    assert half.moved_bytes == 2 * half.swaps * SIZE, "each swap moves one in and one out"
    assert 0 < half.decode_seconds < half.seconds and half.generated == (~trace.prefill).sum()
    assert every.cpu_busy == 0 and none.swaps == every.swaps == 0
    for result in (none, half, every):
        assert result.overlap <= min(result.cpu_busy, result.device_busy) + 1e-12
        assert max(result.cpu_busy, result.device_busy) <= 2 * result.seconds


def test_progress_ends_at_one():
    facts, shares = model(8, 8), []
    simulate(random_trace(2, 8, 2, [20, 1, 1, 1], 0), setting(facts), ["uniform"], [0.5], shares.append)
    assert shares == sorted(shares) and shares[-1] == 1


def test_what_does_not_fit_is_refused():
    facts = model(8, 8)
    trace = random_trace(2, 8, 2, [1], 0)
    for changed, names, fractions, what in (
        ({}, ["best"], [0.5], "unknown; there are uniform"),
        ({}, ["uniform"], [1.5], "from 0 to 1"),
        ({"facts": model(8, 9)}, ["uniform"], [0.5], "the model has"),
        ({"profile": None}, ["frequency"], [0.5], "needs a routing profile"),
        ({"profile": RoutingProfile(1, 8)}, ["frequency"], [0.5], "the model has"),
        ({"hardware": Hardware("cpu", HARDWARE.cpu)}, ["uniform"], [0.5], "no device"),
    ):
        with pytest.raises(ValueError, match=what):
            simulate(trace, replace(setting(facts), **changed), names, fractions)
    with pytest.raises(ValueError, match="no steps"):
        empty = replace(
            trace,
            offsets=trace.offsets[:1],
            experts=trace.experts[:0],
            rows=trace.rows[:0],
            tokens=trace.tokens[:0],
            prefill=trace.prefill[:0],
        )
        simulate(empty, setting(facts), ["uniform"], [0.5])
    found = simulate(trace, replace(setting(facts), profile=None), ["adaptive", "oracle"], [0, 0.01, 1])
    assert len(found) == 6


def test_layers_with_cold_experts_wait_for_the_cpu_by_kt_rules():
    facts = model(8, 8)
    trace = random_trace(2, 8, 2, [20, 1, 1, 1], 0)
    names, fractions = ["kt-front", "uniform"], [0.5, 1]
    without, with_sync = (
        by_name(simulate(trace, replace(setting(facts), kt_sync=s), names, fractions)) for s in (0.0, 1e-3)
    )
    # Half of all experts in front leave one of both layers, in three decode steps.
    for key, layers in ((("kt-front", 0.5), 1), (("kt-front", 1), 0), (("uniform", 0.5), 0)):
        assert with_sync[key].decode_seconds - without[key].decode_seconds == pytest.approx(layers * 3e-3)
