"""The re-planner: forecasts, exchanges that pay, and experts that are never on no side."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers.placement import SIZE, model, models, random_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ktcompile.plan.demand import Demand, savings
from ktcompile.plan.forecast import Forecast
from ktcompile.plan.hardware import PRESETS, preset
from ktcompile.plan.placement import budget_of, place
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.replan import ReplanConfig, replan
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
    assert savings(table, with_prefill)[0, 1] == pytest.approx(0.2 * SIZE / 70e9 + 0.1 * SIZE / 25e9)


def test_where_the_device_is_the_slower_side_it_gets_no_more():
    facts = model(64, top_k=8)
    table = ExpertTable.of(facts, preset("laptop"))
    mask = np.arange(64)[None] < 52
    assert not len(replan(table, demand_of(np.full((1, 64), 0.5)), mask, facts.expert_bytes, **FREE))


@settings(max_examples=80, deadline=None)
@given(models, st.integers(0, 999), st.floats(0, 1), st.floats(0, 0.01), st.sampled_from(list(PRESETS.values())))
def test_moves_keep_the_budget_and_the_link_at_every_point(facts, seed, fraction, link_seconds, machine):
    budget, table = budget_of(facts, fraction), ExpertTable.of(facts, machine)
    residency = Residency(place("random", facts, machine, budget, seed=seed))
    demand = Demand.of_profile(random_profile(facts, seed))
    moves = replan(table, demand, residency.resident, budget, link_seconds, ReplanConfig())
    assert moves.seconds <= link_seconds
    together = Residency(residency.plan("before"))
    together.apply(moves)
    for expert, to_device in zip(moves.experts.tolist(), moves.to_device.tolist(), strict=True):
        assert residency.begin(expert, to_device)
        assert residency.used_bytes <= budget
        residency.finish(expert)
    assert residency.plan("after") == together.plan("after")
    value = savings(table, demand)
    assert (value * together.resident).sum() >= (value * Residency(residency.plan("x")).resident).sum() - 1e-12


class Moving(RuleBasedStateMachine):
    """Random counters, plans and failing copies: every expert stays on one side, within the budget."""

    @initialize(facts=models, fraction=st.floats(0, 1), seed=st.integers(0, 99))
    def start(self, facts, fraction, seed):
        self.facts, self.rng = facts, np.random.default_rng(seed)
        self.table = ExpertTable.of(facts, HARDWARE)
        plan = place("random", facts, HARDWARE, budget_of(facts, fraction), seed=seed)
        self.residency, self.side = Residency(plan), plan.mask()
        self.forecast = Forecast(self.table.shape, self.table.top_k)
        self.copies, self.waiting = {}, []

    @rule(tokens=st.sampled_from([1, 4, 500]))
    def observe(self, tokens):
        rows = self.rng.binomial(tokens, 0.3, self.table.shape) * self.table.exists
        phase = Phase.PREFILL if tokens > 4 else Phase.DECODE
        self.forecast.observe(rows.astype(float), np.minimum(rows, 1.0), float(tokens), 1.0, phase)

    @rule(link=st.floats(0, 0.1))
    def plan(self, link):
        demand, budget = self.forecast.demand(), self.residency.budget_bytes
        moves = replan(self.table, demand, self.residency.resident, budget, link, ReplanConfig())
        self.waiting = list(zip(moves.experts.tolist(), moves.to_device.tolist(), strict=True))

    @rule()
    def begin(self):
        if self.waiting:
            expert, to_device = self.waiting.pop(0)
            used, busy = self.residency.used_bytes, expert in self.residency.moving
            if self.residency.begin(expert, to_device):
                assert not busy
                self.copies[expert] = to_device
            else:
                assert self.residency.used_bytes == used

    @rule(ok=st.booleans(), which=st.integers(0, 99))
    def end(self, ok, which):
        if self.copies:
            expert = sorted(self.copies)[which % len(self.copies)]
            to_device = self.copies.pop(expert)
            if ok:
                self.residency.finish(expert)
                self.side.reshape(-1)[expert] = to_device
            else:
                self.residency.fail(expert)

    @invariant()
    def sound(self):
        if not hasattr(self, "residency"):
            return
        assert (self.residency.resident == self.side).all()
        assert self.residency.moving == frozenset(self.copies)
        assert not (self.residency.resident & ~self.table.exists).any()
        sizes = np.repeat(self.table.bytes, self.table.shape[1])
        coming = sum(sizes[e] for e, to_device in self.copies.items() if to_device)
        assert self.residency.used_bytes == sizes[self.side.reshape(-1)].sum() + coming
        assert self.residency.used_bytes <= self.residency.budget_bytes
        assert self.residency.plan("now").device_bytes <= self.residency.budget_bytes


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_moves_that_cannot_be_are_refused():
    residency = Residency(place("uniform", model(4), HARDWARE, 2 * SIZE))
    assert not residency.begin(0, True), "it is there already"
    assert not residency.begin(2, True), "there is no room"
    assert residency.begin(0, False) and not residency.begin(0, False), "it is on its way"
    assert not residency.begin(2, True), "room is there only once the copy is complete"
    residency.finish(0)
    assert residency.begin(2, True)
    for ended in (residency.finish, residency.fail):
        with pytest.raises(ValueError, match="not being copied"):
            ended(3)
    with pytest.raises(ValueError, match="no expert 4"):
        residency.begin(4, True)
    with pytest.raises(AssertionError, match="being copied"):
        residency.apply(Moves(np.array([1]), np.array([False]), 0.0, 0.0))


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
    for wrong in ({"interval": 0}, {"horizon": 0}, {"margin": -1}, {"link_share": 1.5}):
        with pytest.raises(ValueError, match="must"):
            ReplanConfig(**wrong)
    with pytest.raises(ValueError, match="the model has"):
        Forecast((1, 4), np.array([2.0]), RoutingProfile(1, 5))


@pytest.mark.parametrize("machine", PRESETS)
def test_61_layers_of_256_experts_are_planned_within_5_ms(machine):
    facts = model(*(256,) * 61, top_k=8)
    table, profile = ExpertTable.of(facts, preset(machine)), random_profile(facts, 0)
    budget = budget_of(facts, 0.5)
    resident = place("random", facts, preset(machine), budget).mask()
    forecast = Forecast(table.shape, table.top_k, profile)
    best = np.inf
    for _ in range(10):
        start = time.perf_counter()
        moves = replan(table, forecast.demand(), resident, budget, 1.0, ReplanConfig())
        best = min(best, time.perf_counter() - start)
    assert len(moves) > 100
    assert best < 5e-3
