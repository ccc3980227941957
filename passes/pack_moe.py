"""Turns each `kt::experts` on plain weights into a `kt::moe` on packed ones.

The plain weights are no longer read; the executable supplies the packed ones, so one compiled graph serves every layer
and every model that traces to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from ktcompile.config import CompileOptions
from ktcompile.graph.packed import PackedInput, add_packed_input
from ktcompile.graph.report import CompileReport
from ktcompile.ops.spec import ExpertsSpec


def pack_moe(
    options: CompileOptions,
) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for `options`, whose weight format and ISA hold for every layer."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        nodes = [n for n in gm.graph.nodes if n.target is torch.ops.kt.experts.default]
        packed = 0
        for node in nodes:
            *inputs, gate_up, down, gate_up_bias, down_bias, spec = node.args
            weights = (gate_up, down, gate_up_bias, down_bias)
            if any(w is not None and w not in placeholders for w in weights):
                continue
            spec = replace(ExpertsSpec.decode(spec), weight_format=options.weight_format, isa=options.isa)
            positions = tuple(None if w is None else placeholders.index(w) for w in weights)
            top_k = int(inputs[1].meta["example_value"].shape[1])
            handle = add_packed_input(gm, f"packed_experts_{packed}", PackedInput(positions, spec, top_k))
            with gm.graph.inserting_before(node):
                moe = gm.graph.call_function(torch.ops.kt.moe.default, (*inputs, handle))
            moe.meta = dict(node.meta)
            node.replace_all_uses_with(moe)
            gm.graph.erase_node(node)
            packed += 1
        return packed

    return run
