"""Computed sizes of packed experts equal what packing allocates."""

from __future__ import annotations

import pytest
import torch

from ktcompile import _native
from ktcompile.ops.experts import pack_experts
from ktcompile.ops.spec import Activation
from ktcompile.quant import FORMATS
from ktcompile.quant.packed_size import ExpertShape, expert_bytes, layer_bytes

NODES = max(1, len(_native.numa_nodes()))


def allocated(name, shape, num_experts):
    rows = shape.intermediate_size * (2 if shape.gated else 1)
    gate_up = torch.ones(num_experts, rows, shape.hidden_size)
    down = torch.ones(num_experts, shape.hidden_size, shape.intermediate_size)
    biases = {}
    if shape.biased:
        biases = {
            "gate_up_bias": torch.ones(num_experts, rows),
            "down_bias": torch.ones(num_experts, shape.hidden_size),
        }
    activation = Activation("silu" if shape.gated else "relu2", shape.gated)
    return pack_experts(gate_up, down, name, activation, **biases).nbytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        ExpertShape(64, 32),
        ExpertShape(40, 24),
        ExpertShape(72, 150, gated=False),
        ExpertShape(200, 136, biased=True),
    ],
    ids=str,
)
def test_a_packed_layer_has_the_computed_size(name, shape):
    assert layer_bytes(FORMATS[name], shape, 3, NODES) == allocated(name, shape, 3)
    assert expert_bytes(FORMATS[name], shape, NODES) * 3 == allocated(name, shape, 3)


@pytest.mark.parametrize("name", ["bf16", "int8_dyn", "int4_g32_zp"])
def test_large_buffers_are_whole_huge_pages(name):
    shape = ExpertShape(1056, 352)
    assert layer_bytes(FORMATS[name], shape, 5, NODES) == allocated(name, shape, 5)
    assert layer_bytes(FORMATS[name], shape, 5, NODES) > 5 * expert_bytes(FORMATS[name], shape, NODES)


def test_a_slice_for_each_node_costs_padding_alone():
    shape = ExpertShape(2048, 768)
    whole = expert_bytes(FORMATS["bf16"], shape)
    assert whole == 2 * shape.weights
    assert expert_bytes(FORMATS["bf16"], shape, nodes=2) == whole
    assert whole * 0.5 < expert_bytes(FORMATS["int8"], shape, nodes=2) < whole * 0.51
