"""The re-planner: forecasts, exchanges that pay, and experts that are never on no side."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.placement import SIZE, model, models, random_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ktcompile.plan.demand import Demand
from ktcompile.plan.forecast import Forecast
from ktcompile.plan.hardware import PRESETS, preset
from ktcompile.plan.outlook import Outlook
from ktcompile.plan.placement import budget_of, place
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.replan import ReplanConfig, _candidates, replan
from ktcompile.plan.residency import Moves, Residency
from ktcompile.plan.table import ExpertTable

HARDWARE = preset("4090-ddr5")
FREE = {"link_seconds": 1e9, "config": ReplanConfig()}


def demand_of(touches):
    values = np.asarray(touches, dtype=float)
    return Demand(values, 1.0, np.zeros(values.shape), 0.0)


def setting(facts, resident, budget=None):
    mask = np.zeros((len(facts.layers), max(layer.num_experts for layer in facts.layers)), dtype=bool)
    for layer, ids in enumerate(resident):
        mask[layer, list(ids)] = True
    return ExpertTable.of(facts, HARDWARE), mask, sum(map(len, resident)) * SIZE if budget is None else budget


def test_an_expert_that_is_used_more_replaces_one_that_is_used_less():
    table, mask, budget = setting(model(4), [[0, 1]])
    moves = replan(table, demand_of([[0.9, 0.1, 0.2, 0.8]]), mask, budget, **FREE)
    assert moves.experts.tolist() == [1, 3] and moves.to_device.tolist() == [False, True]
    assert moves.seconds == pytest.approx(SIZE / 25e9) and moves.saved > 0


def test_nearly_equal_use_moves_nothing():
    table, mask, budget = setting(model(4), [[0, 1]])
    assert not len(replan(table, demand_of([[0.5, 0.5, 0.502, 0.503]]), mask, budget, **FREE))
    # Weights that are on the device anyhow, while nothing is read by the CPU, cost nothing.
    passing = np.ones_like(mask)
    moves = replan(table, demand_of([[0.5, 0.5, 0.502, 0.503]]), mask, budget, **FREE, cpu_busy=0.0, passing_LE=passing)
    assert len(moves) == 4 and moves.seconds == 0


def test_the_link_limits_what_moves_and_the_best_go_first():
    table, mask, budget = setting(model(6), [[0, 1]])
    one = SIZE / 25e9 * 1.5
    moves = replan(table, demand_of([[0, 0, 0.5, 0.9, 0.7, 0.1]]), mask, budget, one, ReplanConfig())
    assert moves.experts[moves.to_device].tolist() == [3]
    assert not len(replan(table, demand_of([[0, 0, 0.5, 0.9, 0.7, 0.1]]), mask, budget, 0.0, ReplanConfig()))


def test_room_is_filled_without_taking_any_out():
    table, mask, _ = setting(model(4), [[0]])
    moves = replan(table, demand_of([[0.4, 0.5, 0.4, 0.6]]), mask, 3 * SIZE, **FREE)
    assert moves.to_device.all() and sorted(moves.experts.tolist()) == [1, 3]


def test_a_large_expert_needs_the_room_of_several():
    facts = model(3, 1, sizes=(SIZE, 2 * SIZE))
    table, mask, _ = setting(facts, [[0, 1], []])
    moves = replan(table, demand_of([[0.1, 0.1, 0.0], [0.9, 0.0, 0.0]]), mask, 2 * SIZE, **FREE)
    assert sorted(moves.experts[:2].tolist()) == [0, 1] and moves.experts[2:].tolist() == [3]
    assert moves.to_device.tolist() == [False, False, True]


def test_prefill_rows_count_beside_decode():
    table, mask, budget = setting(model(2), [[0]])
    decode = np.array([[0.3, 0.2]])
    with_prefill = Demand(decode, 1.0, np.array([[0.0, 4000.0]]), 0.1)
    assert not len(replan(table, demand_of(decode), mask, budget, **FREE))
    assert replan(table, with_prefill, mask, budget, **FREE).experts.tolist() == [0, 1]
    # The copy of a streamed expert is the most that its rows may cost.
    assert Outlook(table, with_prefill).savings[0, 1] == pytest.approx(0.2 * SIZE / 70e9 + 0.1 * SIZE / 25e9)


def test_where_the_device_is_the_slower_side_it_gets_no_more():
    facts = model(64, top_k=8)
    table = ExpertTable.of(facts, preset("laptop"))
    mask = np.arange(64)[None] < 52
    assert not replan(table, demand_of(np.full((1, 64), 0.5)), mask, facts.expert_bytes, **FREE).to_device.any()


def laptop_layer(resident):
    facts = model(64, top_k=8)
    return facts, ExpertTable.of(facts, preset("laptop")), np.arange(64)[None] < resident


def test_an_expert_whose_layer_is_faster_without_it_leaves_and_comes_back_when_it_pays():
    facts, table, everything = laptop_layer(64)
    even = demand_of(np.full((1, 64), 8 / 64))
    moves = replan(table, even, everything, facts.expert_bytes, **FREE)
    assert len(moves) and not moves.to_device.any() and moves.saved > 0
    after = everything.copy()
    after.reshape(-1)[moves.experts] = False
    assert Outlook(table, even).step_seconds(after)[0] < Outlook(table, even).step_seconds(everything)[0]
    assert not len(replan(table, even, after, facts.expert_bytes, **FREE)), "what left stays away"
    # Most of what is used now is on the CPU, so that experts come back.
    turned = demand_of(np.where(after, 0.01, 0.7))
    back = replan(table, turned, after, facts.expert_bytes, **FREE)
    assert back.to_device.any()


def test_a_slow_device_leaves_the_cpu_a_steady_share():
    facts, table, mask = laptop_layer(48)
    # Four experts are used by most steps, sixty by few.
    touches = np.where(np.arange(64) >= 60, 0.6, 5.6 / 60)[None]
    pinned = Outlook(table, demand_of(touches)).steadying(facts.expert_bytes)
    assert 1 <= pinned.sum() <= 4 and not pinned[:, :60].any()
    moves = replan(table, demand_of(touches), mask, facts.expert_bytes, **FREE)
    after = mask.copy()
    after.reshape(-1)[moves.experts] = moves.to_device
    assert not after[pinned].any() and after.sum() > 48
    without = demand_of(touches)
    assert (
        Outlook(table, without).step_seconds(after)[0]
        < Outlook(table, without).step_seconds(np.arange(64)[None] >= 13)[0]
    )
    # Where the CPU is the slower side it has nothing of what is used most.
    assert not Outlook(ExpertTable.of(facts, HARDWARE), demand_of(touches)).steadying(facts.expert_bytes / 2).any()


@settings(max_examples=80, deadline=None)
@given(models, st.integers(0, 999), st.floats(0, 1), st.floats(0, 0.01), st.sampled_from(list(PRESETS.values())))
def test_moves_keep_the_budget_and_the_link_at_every_point(facts, seed, fraction, link_seconds, machine):
    budget, table = budget_of(facts, fraction), ExpertTable.of(facts, machine)
    residency = Residency(place("random", facts, machine, budget, seed=seed))
    before, demand = residency.resident, Demand.of_profile(random_profile(facts, seed))
    moves = replan(table, demand, before, budget, link_seconds, ReplanConfig())
    assert moves.seconds <= link_seconds
    assert len(set(moves.experts.tolist())) == len(moves)
    side, size = before.copy(), np.repeat(table.bytes, table.shape[1])
    for expert, to_device in zip(moves.experts.tolist(), moves.to_device.tolist(), strict=True):
        assert side.reshape(-1)[expert] != to_device
        side.reshape(-1)[expert] = to_device
        assert size[side.reshape(-1)].sum() <= budget
    residency.apply(moves)
    assert (residency.resident == side).all() and not (side & ~table.exists).any()
    assert Outlook(table, demand).step_seconds(side)[0] <= Outlook(table, demand).step_seconds(before)[0] * (1 + 1e-9)


class Moving(RuleBasedStateMachine):
    """Random counters, prompts and plans: experts exist on one side each, within the budget, and plans come to rest."""

    @initialize(facts=models, fraction=st.floats(0, 1), seed=st.integers(0, 99), machine=st.sampled_from(list(PRESETS)))
    def start(self, facts, fraction, seed, machine):
        self.facts, self.rng = facts, np.random.default_rng(seed)
        self.table = ExpertTable.of(facts, preset(machine))
        self.residency = Residency(place("random", facts, preset(machine), budget_of(facts, fraction), seed=seed))
        self.forecast = Forecast(self.table.shape, self.table.top_k)

    @rule(tokens=st.sampled_from([1, 4, 500]))
    def observe(self, tokens):
        rows = self.rng.binomial(tokens, 0.3, self.table.shape) * self.table.exists
        phase = Phase.PREFILL if tokens > 4 else Phase.DECODE
        self.forecast.observe(rows.astype(float), np.minimum(rows, 1.0), float(tokens), 1.0, phase)

    @rule(link=st.floats(0, 0.1), passing=st.booleans())
    def plan(self, link, passing):
        demand, budget, before = self.forecast.demand(), self.residency.budget_bytes, self.residency.resident
        streamed = self.rng.random(self.table.shape) < 0.5 if passing else None
        moves = replan(self.table, demand, before, budget, link, ReplanConfig(), passing_LE=streamed)
        kept = before.copy()
        self.residency.apply(moves)
        assert (before == kept).all(), "what was read before a move stays as it was"
        now = Outlook(self.table, demand).step_seconds(self.residency.resident)[0]
        assert now <= Outlook(self.table, demand).step_seconds(before)[0] * (1 + 1e-9)

    @rule()
    def rest(self):
        demand, budget = self.forecast.demand(), self.residency.budget_bytes
        for _ in range(20):
            moves = replan(self.table, demand, self.residency.resident, budget, 1e9, ReplanConfig())
            self.residency.apply(moves)
            if not len(moves):
                return
        raise AssertionError("experts go on moving although nothing changes")

    @invariant()
    def sound(self):
        if hasattr(self, "residency"):
            resident = self.residency.resident
            assert not (resident & ~self.table.exists).any()
            assert (resident.sum(axis=1) * self.table.bytes).sum() <= self.residency.budget_bytes


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_moves_that_cannot_be_are_refused():
    residency = Residency(place("uniform", model(4), HARDWARE, 2 * SIZE))
    for expert, to_device, what in ((0, True, "there already"), (2, False, "there already"), (2, True, "more room")):
        with pytest.raises(AssertionError, match=what):
            residency.apply(Moves(np.array([expert]), np.array([to_device]), 0.0, 0.0))
    residency.apply(Moves(np.array([0, 2]), np.array([False, True]), 0.0, 0.0))
    assert residency.resident.tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match="read-only"):
        residency.resident[0, 0] = True


def observe_random(forecast, share, tokens, phase, rng):
    rows = rng.binomial(tokens, share).astype(float)
    steps = tokens if phase is Phase.DECODE else 1
    forecast.observe(rows, np.minimum(rows, steps), tokens, steps, phase)


def test_a_forecast_keeps_a_profile_that_holds_and_drops_one_that_does_not():
    rng = np.random.default_rng(0)
    share, other = (np.minimum(rng.dirichlet(np.full(32, 0.4), 4) * 4, 1.0) for _ in range(2))
    profile = RoutingProfile(4, 32)
    profile.record_counts(share * 10_000, share * 10_000, 10_000, 10_000, Phase.DECODE)
    forecast = Forecast((4, 32), np.full(4, 4.0), profile)
    for _ in range(5):
        observe_random(forecast, share, 200, Phase.DECODE, rng)
    assert np.abs(forecast.rates() - share).max() < 0.06
    # A prompt of another subject shows at once.
    observe_random(forecast, other, 1000, Phase.PREFILL, rng)
    assert np.abs(forecast.rates() - other).mean() < 0.2 * np.abs(share - other).mean()


def test_demand_counts_steps_touched_in_batches():
    forecast = Forecast((1, 4), np.array([2.0]))
    rows = np.array([[64.0, 32.0, 16.0, 16.0]])
    for _ in range(50):
        forecast.observe(rows, np.array([[8.0, 8.0, 8.0, 8.0]]), 64.0, 8.0, Phase.DECODE)
    demand = forecast.demand()
    assert demand.touches.max() <= 1 and demand.touches[0, 0] > 0.9
    assert demand.touch_rows > 1.5


def test_settings_that_make_no_sense_are_refused():
    for name, value, what in (
        ("interval", 0, "at least 1"),
        ("interval", 2.5, "a whole number"),
        ("horizon", True, "a whole number"),
        ("margin", -1, "must not be negative"),
        ("margin", float("nan"), "must not be negative"),
        ("link_share", 1.5, "from 0 to 1"),
        ("link_share", "0.1", "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*{what}"):
            ReplanConfig(**{name: value})
    assert ReplanConfig(link_share=1, margin=0) == ReplanConfig(link_share=1.0, margin=0.0)
    with pytest.raises(ValueError, match="the model has"):
        Forecast((1, 4), np.array([2.0]), RoutingProfile(1, 5))


@pytest.mark.parametrize("machine", PRESETS)
def test_many_experts_in_the_wrong_place_move_at_once(machine):
    facts = model(*(256,) * 61, top_k=8)
    table, profile = ExpertTable.of(facts, preset(machine)), random_profile(facts, 0)
    budget = budget_of(facts, 0.5)
    resident = place("random", facts, preset(machine), budget).mask()
    forecast = Forecast(table.shape, table.top_k, profile)
    moves = replan(table, forecast.demand(), resident, budget, 1.0, ReplanConfig())
    assert len(moves) > 100
    after = resident.copy()
    after.reshape(-1)[moves.experts] = moves.to_device
    assert float((after.sum(axis=1) * table.bytes).sum()) <= budget


@given(st.integers(0, 10_000), st.integers(0, 40))
def test_experts_of_one_size_that_cannot_be_in_an_exchange_are_left_out(seed, room):
    """What is left out neither comes in nor goes out in the best exchange, which sorting all of them finds."""
    rng = np.random.default_rng(seed)
    value = np.round(rng.normal(size=40), 1)  # with ties
    hot = np.zeros(40, dtype=bool)
    hot[rng.permutation(40)[: rng.integers(0, room + 1)]] = True
    incoming, outgoing = _candidates(value, hot, room, alike=True)
    into, out = np.sort(value[~hot & (value > 0)])[::-1], np.sort(value[hot])
    free, best, used = room - hot.sum(), 0.0, (0, 0)
    for n in range(len(into) + 1):
        for leave in range(max(0, n - free), len(out) + 1):
            gain = into[:n].sum() - out[:leave].sum()
            if gain > best + 1e-9:
                best, used = gain, (n, leave)
    assert used[0] <= len(incoming) and used[1] <= len(outgoing)
    assert np.sort(value[incoming])[::-1][: used[0]].sum() == pytest.approx(into[: used[0]].sum())
    assert np.sort(value[outgoing])[: used[1]].sum() == pytest.approx(out[: used[1]].sum())
