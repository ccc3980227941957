"""What steps are expected to take, against draws of what they do take."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.placement import model, random_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.plan.demand import Demand
from ktcompile.plan.hardware import PRESETS, preset
from ktcompile.plan.interval import Interval
from ktcompile.plan.outlook import Outlook
from ktcompile.plan.step_curves import StepCurves
from ktcompile.plan.synthetic import inclusion
from ktcompile.plan.table import ExpertTable
from ktcompile.plan.trace import Trace


def drawn(popularity, steps, top_k, seed):
    """Return a trace of decode steps that choose top_k different experts, and the chance of each [L, E]."""
    race = np.random.default_rng(seed).standard_exponential((steps, *popularity.shape)) / popularity
    rows = np.zeros(race.shape, dtype=np.int64)
    np.put_along_axis(rows, np.argsort(race, axis=2)[:, :, :top_k], 1, axis=2)
    return Trace.of_counts(rows, np.ones(steps), np.zeros(steps, bool)), inclusion(popularity, top_k)


@pytest.mark.parametrize("machine", PRESETS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_the_expected_step_is_the_mean_of_many(machine, share):
    facts = model(64, 64, top_k=8)
    table = ExpertTable.of(facts, preset(machine))
    popularity = np.exp(np.random.default_rng(1).standard_normal((2, 64)))
    trace, chance = drawn(popularity, 2000, 8, 2)
    outlook = Outlook(table, Demand(chance, 1.0, np.zeros((2, 64)), 0.0))
    for resident in (np.argsort(np.argsort(-chance)) < 64 * share, np.random.default_rng(3).random((2, 64)) < share):
        took = Interval(trace, 0, 2000, table).cost(resident).layers.total.sum() / 2000
        assert outlook.step_seconds(resident)[0] == pytest.approx(took, rel=0.02)


def test_a_prefill_costs_what_its_rows_cost():
    facts = model(16, top_k=4)
    table = ExpertTable.of(facts, preset("4090-ddr5"))
    rows = np.arange(16)[None] * 10 + 100
    trace = Trace.of_counts(rows[None], [int(rows.sum()) // 4], [True])
    outlook = Outlook(table, Demand(np.zeros((1, 16)), 1.0, rows.astype(float), 1.0))
    for resident in (np.arange(16)[None] < n for n in (0, 5, 15, 16)):
        took = Interval(trace, 0, 1, table).cost(resident).layers.total.sum()
        assert outlook.step_seconds(resident)[0] == pytest.approx(took, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from(list(PRESETS.values())))
def test_columns_of_an_order_are_its_placements(seed, machine):
    facts = model(12, 7, top_k=3)
    table, rng = ExpertTable.of(facts, machine), np.random.default_rng(seed)
    outlook = Outlook(table, Demand.of_profile(random_profile(facts, seed)))
    order = np.argsort(np.where(table.exists, rng.random(table.shape), 2.0), axis=1)
    seconds = outlook.layer_seconds(order)
    for n in (0, 1, 5, 7):
        mask = np.zeros(table.shape, dtype=bool)
        np.put_along_axis(mask, order[:, :n], True, axis=1)
        assert outlook.step_seconds(mask & table.exists)[0] == pytest.approx(seconds[:, n].sum())


@pytest.mark.parametrize("machine", PRESETS)
def test_columns_between_those_of_prefills_are_near_their_placements(machine):
    facts = model(256, top_k=8)
    table = ExpertTable.of(facts, preset(machine))
    outlook = Outlook(table, Demand.of_profile(random_profile(facts, 0)))
    order = np.argsort(-outlook.savings, axis=1)
    seconds = outlook.layer_seconds(order)
    for n in range(0, 257, 3):
        mask = np.zeros(table.shape, dtype=bool)
        np.put_along_axis(mask, order[:, :n], True, axis=1)
        exact = outlook.step_seconds(mask)[0]
        # Between the columns a bend is cut off.
        assert seconds[0, n] == pytest.approx(exact, rel=1e-9 if n % 8 == 0 else 0.02), n


def test_a_step_whose_cold_experts_vary_more_takes_longer():
    table = ExpertTable.of(model(64, top_k=8), preset("laptop"))
    curves = StepCurves(table, np.array([8.0]), 1.0)
    mean, variance = np.full((1, 4), 2.0), np.array([[0.0, 0.5, 1.0, 1.5]])
    seconds = curves.at(mean, variance)[0]
    assert (np.diff(seconds) > 0).all()
    # Two of eight always: the device has six.
    device = preset("laptop").device
    assert seconds[0] == pytest.approx(6 * table.bytes[0] / device.bandwidth + device.overhead)


def test_layers_that_touch_different_numbers_have_curves_of_their_own():
    table = ExpertTable.of(model(16, 16, top_k=8), preset("4090-ddr5"))
    touched, at = np.array([2.0, 8.0]), (np.array([[0.5], [3.0]]), np.array([[0.3], [1.0]]))
    both = StepCurves(table, touched, 1.0).at(*at)
    for layer, name in enumerate(("first", "second")):
        one = ExpertTable.of(model(16, top_k=8), preset("4090-ddr5"))
        alone = StepCurves(one, touched[layer : layer + 1], 1.0).at(*(a[layer : layer + 1] for a in at))
        assert both[layer] == pytest.approx(alone[0]), name


def test_a_tenth_of_a_touch_costs_a_tenth_of_a_step_with_one():
    table = ExpertTable.of(model(4, top_k=1), preset("4090-ddr5"))
    one, tenth = (StepCurves(table, np.array([t]), 1.0).at(np.array([[t]]), np.zeros((1, 1))) for t in (1.0, 0.1))
    assert tenth[0, 0] == pytest.approx(one[0, 0] / 10)
