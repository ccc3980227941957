"""The parts of a Dynamo graph that were traced in an experts module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

import ktcompile.ops.moe  # noqa: F401  (defines kt::experts)
from ktcompile.graph.experts import describe
from ktcompile.graph.owners import ParameterOwners
from ktcompile.ops.spec import ExpertsSpec

_OPERATORS = ("kt.experts.default", "kt.moe.default", "kt.fp8_experts.default")


@dataclass(frozen=True, slots=True)
class MoeRegion:
    """All nodes of one experts module, and what replaces them.

    inputs: hidden_states, topk_ids, topk_weights. weights: placeholders of gate_up_proj, down_proj and the
    biases, if any. output: the one tensor that is used outside; sizes may be, too.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, fx.Node, fx.Node]
    weights: tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]
    output: fx.Node
    spec: ExpertsSpec


def find_regions(
    gm: fx.GraphModule, example_inputs: Sequence[object], owners: ParameterOwners
) -> list[MoeRegion | str]:
    """Return each experts module's region, or the reason why it is left as it is. Modules that already call
    an operator of ours are not among them."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, example_inputs, strict=True))
    return [
        _region(path, cls, nodes, values, owners)
        for (path, cls), nodes in _group(gm).items()
        if not any(is_moe(n) for n in nodes)
    ]


def is_moe(node: fx.Node) -> bool:
    """Return whether a node runs all experts of a layer on the kernels."""
    return str(node.target) in _OPERATORS


def _group(gm: fx.GraphModule) -> dict[tuple[str, type], list[fx.Node]]:
    """Nodes by the experts module in whose forward they were traced, placeholders left out."""
    groups: dict[tuple[str, type], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            if isinstance(cls, type) and hasattr(cls, "_apply_gate"):
                if node.op not in ("placeholder", "output"):
                    groups.setdefault((path, cls), []).append(node)
                break
    return groups


def _region(
    path: str, cls: type, nodes: list[fx.Node], values: dict[fx.Node, object], owners: ParameterOwners
) -> MoeRegion | str:
    label = f"{path} ({cls.__name__})"
    inside = set(nodes)
    live_ins = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in nodes if isinstance(value_of(n), torch.Tensor) and any(u not in inside for u in n.users)]
    parameters = {n: v for n in live_ins if isinstance(v := values.get(n), nn.Parameter)}
    module = next((o.module for p in parameters.values() if (o := owners.find(p)) is not None), None)
    if module is None or type(module) is not cls:
        return f"{label}: the module that owns its weights was not found"
    facts = describe(module)
    if isinstance(facts, str):
        return f"{label}: {facts}"
    if len(outputs) != 1:
        return f"{label}: its traced part has {len(outputs)} results that are used elsewhere; expected 1"
    weights = []
    for name in facts.parameters:
        wanted = None if name is None else getattr(module, name)
        node = next((n for n, p in parameters.items() if p is wanted), None)
        if name is not None and node is None:
            return f"{label}: its graph does not read {name} directly"
        weights.append(node)
    # Scalars (a limit that Dynamo made an input) are read from the module, not from the graph.
    others = [n for n in live_ins if n not in weights and isinstance(v := value_of(n), torch.Tensor) and v.dim()]
    inputs = _classify(others, value_of(outputs[0]))
    if inputs is None:
        shapes = [f"{tuple(value_of(n).shape)} {value_of(n).dtype}" for n in others]
        return f"{label}: its inputs {shapes} are not (hidden_states, topk_ids, topk_weights)"
    gate_up, down, *biases = weights
    assert gate_up is not None and down is not None
    return MoeRegion(path, tuple(nodes), inputs, (gate_up, down, biases[0], biases[1]), outputs[0], facts.spec)


def _classify(nodes: list[fx.Node], result: torch.Tensor) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Tell hidden_states [T, H], topk_ids and topk_weights [T, K] apart; None where that is not certain."""
    if any(value_of(n).dim() != 2 for n in nodes):
        return None
    ids = [n for n in nodes if not value_of(n).dtype.is_floating_point]
    floats = [n for n in nodes if value_of(n).dtype.is_floating_point]
    if len(ids) != 1 or len(floats) != 2:
        return None
    hidden = [n for n in floats if value_of(n).shape[1] == result.shape[-1]]
    weights = [n for n in floats if value_of(n).shape[1] == value_of(ids[0]).shape[1]]
    if len(hidden) != 1 or len(weights) != 1 or hidden == weights:
        return None
    return hidden[0], ids[0], weights[0]


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake value that Dynamo recorded for a node."""
    value: torch.Tensor = node.meta.get("example_value")  # type: ignore[assignment]
    return value
