"""What makes the steps of a `_native.Program` of nodes of a graph, and what there is to ask of nodes for it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ktcompile import _native
from ktcompile._native import ElementOp, Opcode
from ktcompile.runtime.program_record import ProgramRecord, Step

ELEMENTS = {
    torch.float32: _native.Element.f32,
    torch.float16: _native.Element.f16,
    torch.bfloat16: _native.Element.bf16,
    torch.int64: _native.Element.i64,
    torch.bool: _native.Element.boolean,
    torch.int32: _native.Element.i32,
    torch.int8: _native.Element.i8,
}
_MOST_DIMENSIONS = 6

Number: TypeAlias = tuple[int, int]
Real: TypeAlias = tuple[float, int]
MISSING: Any = object()  # of a parameter without a default
# In place on what nobody else sees, which is as good as not in place.
FRESH_IN_PLACE = {operator.itruediv: ElementOp.div, operator.imul: ElementOp.mul, operator.iadd: ElementOp.add}
_IN_PLACE = tuple(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow"))


class UnsupportedError(Exception):
    """A node has no step."""


class Builder:
    """Makes steps of nodes. nodes: those of one part, or that may be.

    arrays: which array of the program a node is. inputs: nodes from outside, in the order in which a call gets them:
    of tensors, of whole and of real numbers, of packed layers.
    """

    def __init__(self, nodes: Collection[fx.Node]) -> None:
        self._nodes = nodes
        self._steps: list[tuple[Opcode, list[Any], int, list[Any], list[Any], int]] = []
        self._several: dict[fx.Node, list[Any]] = {}
        self.arrays: dict[fx.Node, Any] = {}
        self.tensor_inputs: list[fx.Node] = []
        self.whole_inputs: list[fx.Node] = []
        self.real_inputs: list[fx.Node] = []
        self.packed_inputs: list[fx.Node] = []

    @property
    def inputs(self) -> list[fx.Node]:
        return [*self.tensor_inputs, *self.whole_inputs, *self.real_inputs, *self.packed_inputs]

    def record(self, outputs: Sequence[fx.Node]) -> ProgramRecord:
        """Return what makes the program whose results are the arrays of `outputs`."""
        numbers: dict[Any, int] = {("in", i): i for i in range(len(self.tensor_inputs))}
        steps = []
        for place, (op, arrays, outs, whole, real, packed) in enumerate(self._steps):
            steps.append(Step(op.name, [numbers[a] for a in arrays], outs, whole, real, packed))
            numbers |= {(place, i): len(numbers) + i for i in range(outs)}
        tensors = [ELEMENTS[tensor_of(n).dtype].name for n in self.tensor_inputs]
        return ProgramRecord(
            tensors,
            len(self.whole_inputs),
            len(self.real_inputs),
            len(self.packed_inputs),
            steps,
            [numbers[self.arrays[n]] for n in outputs],
        )

    def step(
        self,
        op: Opcode,
        arrays: Sequence[Any],
        whole: Sequence[Number] = (),
        real: Sequence[Real] = (),
        packed: int = -1,
        outs: int = 1,
    ) -> list[Any]:
        """Add a step; return what names its arrays."""
        self._steps.append((op, list(arrays), outs, list(whole), list(real), packed))
        return [(len(self._steps) - 1, i) for i in range(outs)]

    def array(self, node: Any) -> Any:
        """Return what names the array of a node."""
        if not isinstance(node, fx.Node):
            raise UnsupportedError("a tensor that is none")
        if node in self.arrays:
            return self.arrays[node]
        value = value_of(node)
        if node in self._nodes and not isinstance(value, Tensor) and node.op != "placeholder":
            return ("out", node)  # while it is only asked whether there is a step
        if not isinstance(value, Tensor) or value.dtype not in ELEMENTS or value.dim() > _MOST_DIMENSIONS:
            raise UnsupportedError("a tensor of another kind")
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise UnsupportedError("a tensor that is elsewhere")
        self.arrays[node] = ("in", len(self.tensor_inputs))
        self.tensor_inputs.append(node)
        return self.arrays[node]

    def number(self, x: Any) -> Number:
        if isinstance(x, fx.Node):
            if not isinstance(value_of(x), (int, torch.SymInt)) or isinstance(value_of(x), bool):
                raise UnsupportedError("a number that is none")
            return 0, _place_in(self.whole_inputs, x)
        if not isinstance(x, int):
            raise UnsupportedError("a number that is none")
        return int(x), -1

    def real(self, x: Any) -> Real:
        if isinstance(x, fx.Node):
            if not isinstance(value_of(x), (float, int, torch.SymFloat)):
                raise UnsupportedError("a number that is none")
            return 0.0, _place_in(self.real_inputs, x)
        if not isinstance(x, (int, float)):
            raise UnsupportedError("a number that is none")
        return float(x), -1

    def packed(self, node: Any) -> int:
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            raise UnsupportedError("packed weights that are computed")
        return _place_in(self.packed_inputs, node)

    def are(self, node: fx.Node, arrays: list[Any]) -> None:
        """Have the arrays of a step be the values of a node."""
        if len(arrays) == 1:
            (self.arrays[node],) = arrays
        else:
            self._several[node] = arrays

    def one_of(self, node: fx.Node, i: int) -> Any:
        """Return what names one of the arrays of a node."""
        return self._several[node][i] if node in self._several else ("out", node)

    def is_inside(self, node: fx.Node) -> bool:
        return node in self._nodes


def changes_memory(node: fx.Node) -> bool:
    """Return whether a node writes to what it is given."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is torch.ops.kt.cached_attention.default:
        return True
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.target in FRESH_IN_PLACE:
        return not is_fresh(node)
    return node.op == "call_function" and (
        name in ("setitem", *_IN_PLACE)
        or name.endswith("_")
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace"))
    )


def is_fresh(node: fx.Node) -> bool:
    """Return whether what a node writes to is a result of `topk` that is not read after it."""
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or changed.target is not operator.getitem:
        return False
    source = changed.args[0]
    if not isinstance(source, fx.Node) or source.target not in (torch.topk, "topk"):
        return False
    seen, earlier = False, set[fx.Node]()
    for other in node.graph.nodes:
        seen = seen or other is node
        if not seen:
            earlier.add(other)
    same = [u for u in source.users if u.args[1:] == changed.args[1:]]
    if any(user.target in ("to", "float") for s in same for user in s.users if user is not node):
        return False  # it may be the same tensor, and be read later
    return all(user is node or user in earlier for s in same for user in s.users)


def value_of(node: fx.Node) -> Any:
    """Return what Dynamo knows a node to be."""
    return node.meta.get("example_value")


def tensor_of(node: Any) -> Tensor:
    """Return the tensor without memory that a node is. UnsupportedError: it is none."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise UnsupportedError("a tensor that is none")
    return value


def arguments_of(node: fx.Node, **defaults: Any) -> list[Any]:
    """Return the arguments of a node by the names of the parameters, in their order."""
    if len(node.args) > len(defaults) or any(name not in defaults for name in node.kwargs):
        raise UnsupportedError(f"arguments of {node.target}")
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return [given.get(name, default) for name, default in defaults.items()]


def _place_in(nodes: list[fx.Node], node: fx.Node) -> int:
    if node not in nodes:
        nodes.append(node)
    return nodes.index(node)
