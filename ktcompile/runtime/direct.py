"""Has a graph call the kernels without torch's dispatcher.

Two crossings from C++ into Python, which is what an operator that is written in Python costs, take longer than the rest
of a call: 46 of 73 µs of a norm of one row, and three times that between kernels that leave nothing in the caches
(two cores of a Zen). A graph that is run as it is needs no dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ktcompile.ops.attention import run as run_attention
from ktcompile.ops.cached_attention import run as run_cached_attention
from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.linear import PackedLinear, run_heads
from ktcompile.ops.linear import run as run_linear
from ktcompile.ops.moe import anywhere
from ktcompile.ops.norm import run as run_norm
from ktcompile.ops.norm import run_add as run_add_norm
from ktcompile.ops.rotary import run as run_rotary


def call_directly(gm: fx.GraphModule) -> None:
    """Replace operators by the functions behind them, which take packed layers where operators take handles.

    What a graph is given for a placeholder of the executable's is the layer itself from now on.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
    gm.recompile()


def _linear(x: Tensor, packed: PackedLinear, out_features: int) -> Tensor:
    return run_linear(x, packed)


def _head_linear(x: Tensor, packed: PackedLinear, out_features: int) -> Tensor:
    return run_heads(x, packed)


def _moe(x: Tensor, ids: Tensor, weights: Tensor, experts: PackedExperts | Tensor) -> Tensor:
    return anywhere(x, ids, weights, from_handle(experts) if isinstance(experts, Tensor) else experts)


_FUNCTIONS: dict[object, Callable[..., Any]] = {
    torch.ops.kt.linear.default: _linear,
    torch.ops.kt.head_linear.default: _head_linear,
    torch.ops.kt.moe.default: _moe,
    torch.ops.kt.rms_norm.default: run_norm,
    torch.ops.kt.add_rms_norm.default: run_add_norm,
    torch.ops.kt.rotary.default: run_rotary,
    torch.ops.kt.attention.default: run_attention,
    torch.ops.kt.cached_attention.default: run_cached_attention,
}
