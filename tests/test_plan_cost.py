"""The cost of a layer: roofline times, and which way cold experts take."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.placement import naive_cost
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.plan.cost import Work, distinct_experts, layer_cost, uniform_layer
from ktcompile.plan.facts import ModelFacts, MoeLayerFacts
from ktcompile.plan.hardware import PRESETS, Hardware, Link, Processor, preset

BYTES = 9_437_184
LAYER = MoeLayerFacts(num_experts=8, top_k=2, hidden_size=2048, intermediate_size=768, expert_bytes=BYTES)
CPU = Processor("cpu", 10**11, 5e10, 1e12, 1e-5)
HYBRID = Hardware("both", CPU, Processor("device", 10**10, 1e12, 1e14, 2e-5), Link(2e10, 1e-5))


def work(cold, hot, rows=1):
    """Return the work of so many experts of `rows` tokens on each side."""
    cpu, device = (p.seconds(BYTES, rows * LAYER.flops_per_row) for p in (HYBRID.cpu, HYBRID.device))
    return Work(cold, hot, cold * cpu, hot * device, (cold + hot) * device, device, cold * BYTES / 2e10)


def test_experts_without_tokens_take_no_time():
    cost = layer_cost(HYBRID, work(0, 0))
    assert (cost.cpu, cost.device, cost.copy, cost.total, cost.streamed) == (0, 0, 0, 0, False)


def test_cpu_and_device_work_side_by_side():
    cost = layer_cost(HYBRID, work(4, 4), "split")
    assert cost.cpu == pytest.approx(4 * BYTES / 5e10 + 1e-5)
    assert cost.device == pytest.approx(4 * BYTES / 1e12 + 2e-5)
    assert cost.total == max(cost.cpu, cost.device)


def test_cold_experts_are_streamed_once_they_have_many_rows():
    assert not layer_cost(HYBRID, work(7, 1)).streamed
    many = layer_cost(HYBRID, work(7, 1, 4096))
    assert many.streamed and many.cpu == 0
    assert many.copy == pytest.approx(7 * BYTES / 2e10 + 1e-5)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 5000))
def test_the_faster_way_is_taken(cold, hot, rows):
    costs = {way: float(layer_cost(HYBRID, work(cold, hot, rows), way).total) for way in ("split", "streamed")}
    assert layer_cost(HYBRID, work(cold, hot, rows)).total == min(costs.values())
    assert layer_cost(HYBRID, work(cold, hot, rows), "streamed").streamed == (cold > 0)


def test_arrays_cost_what_each_call_costs():
    cold, hot = np.array([0, 3, 0, 5]), np.array([0, 0, 4, 2])
    for rows in (1, 3000):
        together = layer_cost(HYBRID, work(cold, hot, rows))
        for index in range(4):
            one = layer_cost(HYBRID, work(int(cold[index]), int(hot[index]), rows))
            assert together.total[index] == pytest.approx(float(one.total))
            assert together.streamed[index] == one.streamed


def test_without_a_device_all_is_the_cpus():
    alone = Hardware("cpu", CPU)
    cost = uniform_layer(alone, LAYER, 1, 0)
    assert cost.total == cost.cpu == pytest.approx(2 * BYTES / 5e10 + 1e-5)
    assert not cost.streamed
    with pytest.raises(AssertionError, match="no device"):
        uniform_layer(alone, LAYER, 1, 1)


@pytest.mark.parametrize("machine", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("resident", [0, 3, 8])
def test_a_uniform_layer_of_many_tokens_costs_what_its_experts_cost(machine, resident):
    # With this many tokens each expert has a quarter of them, and a mean is what happens.
    rows, hot = np.full(8, 1000), np.arange(8) < resident
    found = uniform_layer(machine, LAYER, 4000, resident)
    cpu, device, copy, total, streamed = naive_cost(machine, LAYER, rows, hot)
    assert [found.cpu, found.device, found.copy, found.total] == pytest.approx([cpu, device, copy, total])
    assert found.streamed == streamed


def test_experts_that_tokens_touch():
    layer = MoeLayerFacts(64, 8, 2048, 1024, BYTES)
    assert distinct_experts(layer, 1) == pytest.approx(8)
    assert distinct_experts(layer, 8) == pytest.approx(64 * (1 - (7 / 8) ** 8))
    assert distinct_experts(layer, 10_000) == pytest.approx(64)
    assert distinct_experts(MoeLayerFacts(8, 8, 64, 64, 1), 1) == 8


def test_facts_and_hardware_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="top_k is 9"):
        MoeLayerFacts(8, 9, 64, 64, 1)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        MoeLayerFacts(8, 2, 0, 64, 1)
    with pytest.raises(ValueError, match="both a device and a link"):
        Hardware("half", CPU, None, Link(1e9, 0))
    with pytest.raises(ValueError, match="presets are 4090-ddr5"):
        preset("4091")


def test_sizes_add_up():
    assert ModelFacts((LAYER, LAYER)).expert_bytes == 16 * 9_437_184
    assert all(h.device is not None for h in PRESETS.values())
