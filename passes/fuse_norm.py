"""Replaces what was traced in each root-mean-square normalisation by one `kt::rms_norm`.

Changes numbers: squares are summed in the order of the kernels, which does not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.norms import NormFacts, describe_norm, epsilon_of
from ktcompile.graph.owners import ParameterOwners
from ktcompile.graph.regions import value_of
from ktcompile.graph.report import CompileReport
from ktcompile.quant import FLOAT_DTYPES


def fuse_norm(owners: ParameterOwners) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for a graph whose parameters have these owners."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        """Return how many were replaced."""
        if needs_gradients(example_inputs):
            return 0
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        parameters = {
            node: value
            for node, value in zip(placeholders, example_inputs, strict=True)
            if isinstance(value, nn.Parameter) and value.dim() == 1 and value.device.type == "cpu"
        }
        known: dict[object, NormFacts | None] = {}
        return sum(_replace(gm, nodes, parameters, owners, known) for nodes in _by_module(gm))

    return run


def _by_module(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Return the nodes that were traced in the innermost module of each path."""
    groups: dict[object, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and node.op not in ("placeholder", "output"):
            groups.setdefault(next(reversed(stack.values())), []).append(node)
    return list(groups.values())


def _replace(
    gm: fx.GraphModule,
    nodes: list[fx.Node],
    parameters: dict[fx.Node, nn.Parameter],
    owners: ParameterOwners,
    known: dict[object, NormFacts | None],
) -> bool:
    inside = set(nodes)
    inputs = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    weights = [n for n in inputs if n in parameters]
    # Scalars (an epsilon that Dynamo made an input) are read from the module, not from the graph.
    others = [n for n in inputs if n not in parameters and isinstance(v := value_of(n), torch.Tensor) and v.dim()]
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    if not (len(weights) == len(others) == len(outputs) == 1):
        return False
    (weight,), (x,), (output,) = weights, others, outputs
    before, after = value_of(x), value_of(output)
    if before.dtype not in FLOAT_DTYPES or before.dtype != after.dtype or before.shape != after.shape:
        return False
    owner = owners.find(parameters[weight])
    if owner is None or owner.module._parameters.get("weight") is not parameters[weight]:
        return False
    # Modules of one class and one epsilon compute the same.
    key = type(owner.module), epsilon_of(owner.module)
    if key not in known:
        known[key] = describe_norm(owner.module)
    facts = known[key]
    if facts is None:
        return False
    with gm.graph.inserting_after(output):
        new = gm.graph.call_function(
            torch.ops.kt.rms_norm.default, (x, weight, facts.epsilon, facts.offset, facts.round_first)
        )
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return True
