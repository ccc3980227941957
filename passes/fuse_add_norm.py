"""Replaces each sum and the `kt::rms_norm` of it by one `kt::add_rms_norm`, which gives both."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from ktcompile.graph.regions import value_of
from ktcompile.graph.report import CompileReport
from ktcompile.graph.shapes import same_sizes

_ADD = (operator.add, torch.add, "add")


def fuse_add_norm(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
    """Return how many were replaced."""
    norms = [n for n in gm.graph.nodes if n.target is torch.ops.kt.rms_norm.default and _is_sum(n.args[0])]
    for norm in norms:
        _replace(gm, norm)
    return len(norms)


def _is_sum(node: object) -> bool:
    """Return whether `node` is the sum of two tensors like itself, and has no norm yet."""
    if not isinstance(node, fx.Node) or node.target not in _ADD or len(node.args) != 2 or node.kwargs:
        return False
    values = [value_of(n) for n in (node, *node.args) if isinstance(n, fx.Node)]
    if len(values) != 3 or not all(isinstance(v, torch.Tensor) for v in values):
        return False
    whole, *parts = values
    alike = all(same_sizes(p.shape, whole.shape) and p.dtype == whole.dtype and p.device == whole.device for p in parts)
    return alike and sum(u.target is torch.ops.kt.rms_norm.default for u in node.users) == 1


def _replace(gm: fx.GraphModule, norm: fx.Node) -> None:
    total, *settings = norm.args
    assert isinstance(total, fx.Node)
    with gm.graph.inserting_before(total):
        both = gm.graph.call_function(torch.ops.kt.add_rms_norm.default, (*total.args, *settings))
        results = [gm.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    for old, new in zip((total, norm), results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    gm.graph.erase_node(norm)
    gm.graph.erase_node(total)
