"""The threshold of streaming: where the cost of both ways crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.plan.cost import uniform_layer
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import PRESETS, Hardware, Link, preset
from ktcompile.plan.streaming import streaming_threshold

LAYER = MoeLayerFacts(128, 8, 2048, 768, 3 * 2048 * 768)
layers = st.builds(
    lambda experts, top_k, bits: MoeLayerFacts(experts, min(top_k, experts), 2048, 768, 3 * 2048 * 768 * bits // 8),
    st.integers(1, 256),
    st.integers(1, 8),
    st.sampled_from([4, 8, 16]),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(PRESETS.values())), layers, st.floats(0, 1))
def test_streaming_is_faster_from_the_threshold_on_and_not_just_below(machine, layer, share):
    resident = int(share * layer.num_experts)
    found = streaming_threshold(machine, layer, resident)
    if found is None:
        assert not uniform_layer(machine, layer, 10**6, resident).streamed
        return
    for tokens in (found, found + 1, 2 * found, 17 * found, 10**6):
        assert uniform_layer(machine, layer, tokens, resident).streamed, tokens
    if found > 1:
        assert not uniform_layer(machine, layer, found - 1, resident).streamed


def test_a_slower_link_needs_more_tokens():
    machine = preset("4090-ddr5")
    found = [streaming_threshold(replace(machine, link=Link(speed, 1e-5)), LAYER, 16) for speed in (5e10, 2.5e10, 6e9)]
    assert found == sorted(found) and 1 < found[0] < found[-1]


def test_it_never_pays_where_there_is_nothing_to_stream_or_no_way_to():
    machine = preset("4090-ddr5")
    assert streaming_threshold(machine, LAYER, 128) is None
    assert streaming_threshold(Hardware("cpu", machine.cpu), LAYER, 0) is None
    slow = replace(machine, link=Link(1.0, 0.0))
    assert streaming_threshold(slow, LAYER, 0) is None


def test_more_experts_than_there_are_is_refused():
    for resident in (-1, 129):
        with pytest.raises(ValueError, match=f"resident is {resident}; the layer has 128"):
            streaming_threshold(preset("laptop"), LAYER, resident)
