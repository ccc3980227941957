"""Turns each `kt::experts` on plain weights into a `kt::moe` on packed ones.

The packed weights enter the graph as a new placeholder, `PACKED` in its meta says which inputs they are packed
from; the plain weights are no longer read. The executable fills it, so one compiled graph serves every layer
and every model that traces to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch._guards import detect_fake_mode

from ktcompile.config import CompileOptions
from ktcompile.graph.packed import PACKED, PackedInput
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
            handle = _add_placeholder(gm, f"packed_experts_{packed}", PackedInput(positions, spec, top_k))
            with gm.graph.inserting_before(node):
                moe = gm.graph.call_function(torch.ops.kt.moe.default, (*inputs, handle))
            moe.meta = dict(node.meta)
            node.replace_all_uses_with(moe)
            gm.graph.erase_node(node)
            packed += 1
        return packed

    return run


def _add_placeholder(gm: fx.GraphModule, name: str, packed: PackedInput) -> fx.Node:
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    mode = detect_fake_mode([n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"])
    handle = torch.zeros(1, dtype=torch.int64)
    node.meta["example_value"] = mode.from_tensor(handle) if mode else handle
    node.meta[PACKED] = packed
    return node
