"""Splits each `kt::moe` into a part for the CPU, which is submitted and waited for, and one for the device.

Changes numbers: the two parts are rounded to the dtype of the hidden states before they are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ktcompile.graph.report import CompileReport


def split_experts(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
    """Return how many layers were split. Where their experts are is no part of the graph."""
    nodes = [n for n in gm.graph.nodes if n.target is torch.ops.kt.moe.default]
    for node in nodes:
        x, ids, weights, handle = node.args
        with gm.graph.inserting_before(node):
            ticket = _call(gm, torch.ops.kt.moe_submit.default, (x, ids, weights, handle), handle)
            resident = _call(gm, torch.ops.kt.moe_resident.default, (x, weights, ticket), node)
            total = _call(gm, torch.ops.kt.moe_wait.default, (x, resident, ticket), node)
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)
    return len(nodes)


def _call(gm: fx.GraphModule, target: object, args: tuple[fx.Node, ...], like: fx.Node) -> fx.Node:
    node = gm.graph.call_function(target, args)  # type: ignore[arg-type]
    if "example_value" in like.meta:
        node.meta["example_value"] = like.meta["example_value"]
    return node
