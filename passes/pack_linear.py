"""Turns linear layers on constant weights into `kt::linear` on packed ones; those with the same input into one.

The packed weights enter the graph as those of experts do. Changes numbers: products are summed in the order of the
kernels, which is the same for one row and for thousands.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx, nn

from ktcompile.config import CompileOptions
from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.packed import PackedInput, add_packed_input
from ktcompile.graph.report import CompileReport
from ktcompile.ops.spec import LinearSpec
from ktcompile.quant import FLOAT_DTYPES

_LINEAR = torch._C._nn.linear
# Layers with fewer outputs keep their format. They are a small part of what a step reads, and routers, which are among
# them, choose by small differences.
_FEWEST_FEATURES = 512
_ARGUMENTS = ("input", "weight", "bias")
_CASTS = ("type", "to", "float")


class _Layer(NamedTuple):
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def features(self) -> int:
        return int(self.weight.meta["example_value"].shape[0])


def pack_linear(
    options: CompileOptions,
) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for `options`, whose ISA and formats of dense layers and the head hold for layers that are not
    small."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        if needs_gradients(example_inputs):
            return 0
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        values = dict(zip(placeholders, example_inputs, strict=False))
        layers = [layer for node in gm.graph.nodes if (layer := _layer(node, values)) is not None]
        inputs, inner = Counter(layer.x for layer in layers), _before_parameters(gm, layers, values)
        together: dict[tuple[fx.Node, str], list[_Layer]] = {}
        for layer in layers:
            weight_format = "auto"
            if layer.features >= _FEWEST_FEATURES:
                is_head = inputs[layer.x] == 1 and layer.node not in inner
                weight_format = options.format_of_head if is_head else options.dense_format
            together.setdefault((layer.x, weight_format), []).append(layer)
        for number, ((x, weight_format), joined) in enumerate(together.items()):
            spec = LinearSpec(len(joined), weight_format, options.isa)
            parts = [*(layer.weight for layer in joined), *(layer.bias for layer in joined)]
            positions = tuple(None if n is None else placeholders.index(n) for n in parts)
            handle = add_packed_input(gm, f"packed_linear_{number}", PackedInput(positions, spec))
            _replace(gm, x, joined, handle)
        for node in reversed(gm.graph.nodes):
            if node.op == "call_method" and node.target in _CASTS and not node.users:
                gm.graph.erase_node(node)
        return len(layers)

    return run


def _layer(node: fx.Node, values: dict[fx.Node, object]) -> _Layer | None:
    """Return what a node is a linear layer of; None: it is none, or its weight is no parameter that can be packed."""
    if node.target is not _LINEAR:
        return None
    given = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
    x, weight, bias = given.get("input"), *(_source(given.get(name)) for name in _ARGUMENTS[1:])
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    for part in (weight, bias):
        value = values.get(part) if isinstance(part, fx.Node) else None
        if part is not None and not (isinstance(value, nn.Parameter) and _can_be_packed(value)):
            return None
    if len(weight.meta["example_value"].shape) != 2:
        return None
    return _Layer(node, x, weight, bias if isinstance(bias, fx.Node) else None)


def _before_parameters(gm: fx.GraphModule, layers: Sequence[_Layer], values: dict[fx.Node, object]) -> set[fx.Node]:
    """Return the nodes on whose results parameters work further on."""
    with_parameters = {layer.node for layer in layers}
    for placeholder, value in values.items():
        if isinstance(value, nn.Parameter):
            with_parameters.update(placeholder.users)
    result: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(user in with_parameters or user in result for user in node.users):
            result.add(node)
    return result


def _source(x: object) -> object:
    """Return what `x` is as fp32, as routers have their weights: the kernels compute with rows of fp32 in fp32."""
    while isinstance(x, fx.Node) and x.op == "call_method" and x.target in _CASTS:
        wanted = [*x.args[1:], *x.kwargs.values()]
        if wanted != ([] if x.target == "float" else [torch.float32]):
            break
        x = x.args[0]
    return x


def _can_be_packed(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype in FLOAT_DTYPES and value.numel() > 0


def _replace(gm: fx.GraphModule, x: fx.Node, layers: Sequence[_Layer], handle: fx.Node) -> None:
    """Put one operator in the place of all layers of an input; each takes its columns of the result."""
    first = layers[0].node
    sizes = [layer.features for layer in layers]
    with gm.graph.inserting_before(first):
        joint = gm.graph.call_function(torch.ops.kt.linear.default, (x, handle, sum(sizes)))
        results = [joint]
        if len(layers) > 1:
            parts = gm.graph.call_function(torch.split, (joint, sizes, -1))
            results = [gm.graph.call_function(operator.getitem, (parts, i)) for i in range(len(layers))]
    for layer, result in zip(layers, results, strict=True):
        result.meta = dict(layer.node.meta)
        layer.node.replace_all_uses_with(result)
        gm.graph.erase_node(layer.node)
