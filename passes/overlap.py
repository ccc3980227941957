"""Puts distance between the submission of the CPU's experts and the wait for them.

A submission moves up to where its arguments are ready, a wait down to its first use, so that the device's part and
whatever else does not need the sum, such as a shared expert, runs in between. No number changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ktcompile.graph.report import CompileReport


def overlap(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
    """Return how many submissions and waits were moved."""
    moved = 0
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.kt.moe_submit.default:
            moved += _move_up(gm, node)
    for node in reversed(list(gm.graph.nodes)):
        if node.target is torch.ops.kt.moe_wait.default:
            moved += _move_down(gm, node)
    return moved


def _move_up(gm: fx.GraphModule, node: fx.Node) -> bool:
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    last = max(node.all_input_nodes, key=order.__getitem__)
    if last.op == "placeholder":
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    if last.next is node:
        return False
    last.append(node)
    return True


def _move_down(gm: fx.GraphModule, node: fx.Node) -> bool:
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first = min(node.users, key=order.__getitem__)
    if node.next is first:
        return False
    first.prepend(node)
    return True
