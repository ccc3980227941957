"""Plans and the strategies that make them: always within the budget, and sound at its ends."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.placement import SIZE, model, models, random_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.plan.demand import Demand
from ktcompile.plan.hardware import PRESETS, Hardware, preset
from ktcompile.plan.outlook import Outlook
from ktcompile.plan.placement import STRATEGIES, budget_of, place
from ktcompile.plan.plan import Plan
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.table import ExpertTable

HARDWARE = preset("4090-ddr5")
hardware = st.sampled_from(list(PRESETS.values()))


@given(models, st.sampled_from(list(STRATEGIES)), st.floats(0, 1), st.integers(0, 99), hardware)
def test_a_plan_keeps_to_its_budget_and_is_the_same_again(facts, strategy, fraction, seed, machine):
    budget, profile = budget_of(facts, fraction), random_profile(facts, seed)
    plan = place(strategy, facts, machine, budget, profile, seed)
    assert plan.device_bytes <= budget
    assert plan == place(strategy, facts, machine, budget, profile, seed)
    assert Plan.of_mask(facts, plan.mask(), budget, strategy, plan.reasons) == plan


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_budgets_of_nothing_and_of_less_than_an_expert_place_none(strategy):
    facts = model(4, 6)
    for budget in (0, 1, SIZE - 1):
        assert place(strategy, facts, HARDWARE, budget, random_profile(facts, 1)).num_resident == 0
    assert place(strategy, facts, HARDWARE, SIZE, random_profile(facts, 1)).num_resident == 1


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("frequency", "adaptive")])
def test_budgets_of_everything_place_all(strategy):
    facts = model(4, 6, 1)
    for budget in (facts.expert_bytes, 10 * facts.expert_bytes):
        assert place(strategy, facts, HARDWARE, budget, random_profile(facts, 1)).num_resident == 11


def test_what_each_strategy_takes_first():
    facts = model(4, 4)
    profile = RoutingProfile(2, 4)
    counts = np.array([[1, 9, 2, 8], [7, 3, 30, 4]])
    profile.record_counts(counts, counts, 32, 32, Phase.DECODE)

    def resident(strategy, experts):
        return place(strategy, facts, HARDWARE, experts * SIZE, profile).resident

    assert resident("uniform", 3) == ((0, 1), (0,))
    assert resident("front", 5) == ((0, 1, 2, 3), (0,))
    assert resident("frequency", 3) == ((1, 3), (2,))
    assert resident("counts", 4) == ((1, 3), (0, 2))
    assert resident("adaptive", 3) == resident("frequency", 3)
    assert place("adaptive", facts, HARDWARE, 3 * SIZE).resident == resident("uniform", 3)
    assert place("frequency", facts, HARDWARE, 3 * SIZE, RoutingProfile(2, 4)).resident == resident("uniform", 3)


def test_bytes_count_against_what_an_expert_saves():
    # Reading takes as long as bytes do, so decode saves about the same for each byte; more touches decide.
    facts = model(2, 2, sizes=(SIZE, 3 * SIZE))
    profile = RoutingProfile(2, 2)
    counts = np.array([[10, 5], [8, 7]])
    profile.record_counts(counts, counts, 15, 15, Phase.DECODE)
    assert place("frequency", facts, HARDWARE, SIZE, profile).resident == ((0,), ())
    assert place("frequency", facts, HARDWARE, 4 * SIZE, profile).resident == ((0,), (0,))


@settings(max_examples=40, deadline=None)
@given(models, st.integers(0, 999), hardware, st.integers(0, 5))
def test_a_larger_budget_never_makes_the_expected_step_slower(facts, seed, machine, prefills):
    profile = random_profile(facts, seed, prefills=prefills)
    table, demand = ExpertTable.of(facts, machine), Demand.of_profile(profile)
    before, taken = np.inf, np.zeros(table.shape, dtype=bool)
    for budget in range(0, facts.expert_bytes + SIZE, SIZE):
        mask = place("frequency", facts, machine, budget, profile).mask()
        assert (mask | ~taken).all(), "a larger budget took an expert away"
        seconds = Outlook(table, demand).step_seconds(mask)[0]
        assert seconds <= before * (1 + 1e-9) + 1e-15
        before, taken = seconds, mask


def test_a_slow_device_leaves_work_to_the_cpu():
    facts = model(64, top_k=8)
    profile = RoutingProfile(1, 64)
    profile.record_counts(np.full((1, 64), 100), np.full((1, 64), 100), 800, 800, Phase.DECODE)
    plan = place("frequency", facts, preset("laptop"), facts.expert_bytes, profile)
    assert 32 < plan.num_resident < 64
    assert "left to the CPU" in plan.reasons[0]


def test_without_a_device_nothing_is_placed():
    facts, alone = model(4), Hardware("cpu", HARDWARE.cpu)
    plan = place("frequency", facts, alone, facts.expert_bytes)
    assert plan.num_resident == 0 and "no device" in plan.reasons[0]


def test_what_cannot_be_is_refused():
    facts = model(4, 2)
    for resident, budget, what in (
        (((0,),), 0, "1 layers; the model has 2"),
        (((1, 0), ()), SIZE, "must ascend"),
        (((0, 0), ()), 2 * SIZE, "must ascend"),
        (((), (2,)), SIZE, "experts 0 to 1"),
        (((-1,), ()), SIZE, "experts 0 to 3"),
        (((0, 1), ()), SIZE, "the budget is"),
        (((), ()), -1, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=what):
            Plan(facts, resident, budget, "test")
    with pytest.raises(ValueError, match="unknown; there are uniform"):
        place("best", facts, HARDWARE, 0)
    with pytest.raises(ValueError, match="negative"):
        place("uniform", facts, HARDWARE, -1)
    with pytest.raises(ValueError, match="needs a routing profile"):
        place("frequency", facts, HARDWARE, 0)
    with pytest.raises(ValueError, match="the model has"):
        place("frequency", facts, HARDWARE, 0, RoutingProfile(2, 5))
    with pytest.raises(ValueError, match="from 0 to 1"):
        budget_of(facts, 1.5)
