"""The operators of a split layer where tensors are on a GPU, as far as can be said without one."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import HIDDEN, random_layer
from torch import fx
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch._subclasses import FakeTensorMode

from ktcompile.ops.moe import anywhere

SPLIT = ("moe_submit", "moe_resident", "moe_wait")
OPERATORS = (*SPLIT, "moe", "experts")


@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_graphs_end_before_the_operators(name):
    operator = getattr(torch.ops.kt, name).default
    assert torch.Tag.cudagraph_unsafe in operator.tags
    graph = fx.Graph()
    arguments = tuple(graph.placeholder(a.name) for a in operator._schema.arguments)
    assert is_cudagraph_unsafe_fx_node(graph.call_function(operator, arguments))
    assert not is_cudagraph_unsafe_fx_node(graph.call_function(torch.ops.aten.sin.default, arguments[:1]))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_tensors_of_a_gpu(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kt::{name}", key)


def test_results_are_where_the_hidden_states_are():
    """Weights, handle and ticket stay on the CPU."""
    layer = random_layer()
    experts = layer.pack()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids, weights = torch.zeros(3, 2, dtype=torch.int64, device="cuda"), torch.zeros(3, 2, device="cuda")
        ticket = torch.ops.kt.moe_submit(x, ids, weights, experts.handle)
        assert ticket.device.type == "cpu" and ticket.shape == (1,) and ticket.dtype == torch.int64
        part = torch.ops.kt.moe_resident(x, weights, ticket)
        plain = torch.ops.kt.experts(x, ids, weights, *layer.weights, layer.spec.encode())
        for result in (
            part,
            torch.ops.kt.moe_wait(x, part, ticket),
            torch.ops.kt.moe(x, ids, weights, experts.handle),
            plain,
        ):
            assert result.device.type == "cuda" and result.shape == x.shape and result.dtype == x.dtype


def test_a_layer_that_is_the_cpus_says_what_to_do():
    experts = random_layer().pack()
    x = torch.empty(3, HIDDEN, device="meta")  # not the CPU's, as far as the operator can see
    with pytest.raises(ValueError, match=r'hidden_states is on meta, .* options=\{"device": "cuda"\}'):
        anywhere(x, torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), experts)
