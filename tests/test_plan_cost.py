"""The cost model: roofline times, and which way cold experts take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.plan.cost import CostModel
from ktcompile.plan.facts import ModelFacts, MoeLayerFacts
from ktcompile.plan.hardware import PRESETS, Hardware, Link, Processor, preset

LAYER = MoeLayerFacts(num_experts=8, top_k=2, hidden_size=2048, intermediate_size=768, expert_bytes=9_437_184)
CPU = Processor("cpu", 10**11, 5e10, 1e12, 1e-5)
HYBRID = Hardware("both", CPU, Processor("device", 10**10, 1e12, 1e14, 2e-5), Link(2e10, 1e-5))


def mask(*experts: int) -> np.ndarray:
    return np.isin(np.arange(LAYER.num_experts), experts)


def test_one_row_takes_as_long_as_its_weights_take_to_be_read():
    rows = np.array([1, 0, 0, 0, 0, 0, 0, 0])
    assert CostModel(HYBRID).cpu_seconds(LAYER, rows)[0] == pytest.approx(9_437_184 / 5e10)
    assert CostModel(HYBRID).cpu_seconds(LAYER, rows * 10_000)[0] == pytest.approx(10_000 * 6 * 2048 * 768 / 1e12)


def test_experts_without_tokens_take_no_time():
    cost = CostModel(HYBRID).layer(LAYER, np.zeros(8, dtype=np.int64), mask(0, 1))
    assert (cost.cpu, cost.device, cost.copy, cost.total) == (0, 0, 0, 0)


def test_cpu_and_device_work_side_by_side():
    rows = np.ones(8, dtype=np.int64)
    cost = CostModel(HYBRID).split(LAYER, rows, mask(0, 1, 2, 3))
    assert cost.cpu == pytest.approx(4 * 9_437_184 / 5e10 + 1e-5)
    assert cost.device == pytest.approx(4 * 9_437_184 / 1e12 + 2e-5)
    assert cost.total == max(cost.cpu, cost.device)


def test_cold_experts_are_streamed_once_they_have_many_rows():
    model = CostModel(HYBRID)
    assert not model.layer(LAYER, np.full(8, 1), mask(0)).streamed
    many = model.layer(LAYER, np.full(8, 4096), mask(0))
    assert many.streamed
    assert many.copy == pytest.approx(7 * 9_437_184 / 2e10 + 1e-5)


@given(st.lists(st.integers(0, 5000), min_size=8, max_size=8), st.sets(st.integers(0, 7)))
def test_the_better_way_is_taken(rows, resident):
    model, counts, on_device = CostModel(HYBRID), np.array(rows), mask(*resident)
    best = model.layer(LAYER, counts, on_device).total
    assert best == min(model.split(LAYER, counts, on_device).total, model.streamed(LAYER, counts, on_device).total)


def test_without_a_device_all_is_the_cpus():
    alone = CostModel(Hardware("cpu", CPU))
    cost = alone.layer(LAYER, np.ones(8, dtype=np.int64), mask())
    assert cost.total == cost.cpu > 0
    with pytest.raises(ValueError, match="no device"):
        alone.device_seconds(LAYER, np.ones(8, dtype=np.int64))


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
