"""From nodes of a graph to the steps of a `_native.Program`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ktcompile import _native
from ktcompile._native import ElementOp, Opcode
from ktcompile.graph.shapes import same_sizes
from ktcompile.quant import FLOAT_DTYPES
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
_END = 2**62  # of a slice that goes to the end

Number: TypeAlias = tuple[int, int]
Real: TypeAlias = tuple[float, int]


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

    def add(self, node: fx.Node) -> None:
        """Add the steps of a node. UnsupportedError: it has none."""
        handler = _HANDLERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if handler is None:
            raise UnsupportedError(str(node.target))
        handler(self, node)

    def record(self, outputs: Sequence[fx.Node]) -> ProgramRecord:
        """Return what makes the program whose results are the arrays of `outputs`."""
        numbers: dict[Any, int] = {("in", i): i for i in range(len(self.tensor_inputs))}
        steps = []
        for place, (op, arrays, outs, whole, real, packed) in enumerate(self._steps):
            steps.append(Step(op.name, [numbers[a] for a in arrays], outs, whole, real, packed))
            numbers |= {(place, i): len(numbers) + i for i in range(outs)}
        arguments = [ELEMENTS[_value(n).dtype].name for n in self.tensor_inputs]
        return ProgramRecord(arguments, steps, [numbers[self.arrays[n]] for n in outputs])

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
        value = _value(node)
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
            if not isinstance(_value(x), (int, torch.SymInt)) or isinstance(_value(x), bool):
                raise UnsupportedError("a number that is none")
            return 0, _place_in(self.whole_inputs, x)
        if not isinstance(x, int):
            raise UnsupportedError("a number that is none")
        return int(x), -1

    def real(self, x: Any) -> Real:
        if isinstance(x, fx.Node):
            if not isinstance(_value(x), (float, int, torch.SymFloat)):
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
    if node.target in _FRESH_IN_PLACE:
        return not _is_fresh(node)
    return node.op == "call_function" and (
        name in ("setitem", *_IN_PLACE)
        or name.endswith("_")
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace"))
    )


_IN_PLACE = tuple(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow"))
# In place on what nobody else sees, which is as good as not in place.
_FRESH_IN_PLACE = {operator.itruediv: ElementOp.div, operator.imul: ElementOp.mul, operator.iadd: ElementOp.add}


def _is_fresh(node: fx.Node) -> bool:
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
    return all(user is node or user in earlier for s in same for user in s.users)


def _place_in(nodes: list[fx.Node], node: fx.Node) -> int:
    if node not in nodes:
        nodes.append(node)
    return nodes.index(node)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _tensor(node: Any) -> Tensor:
    value = _value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise UnsupportedError("a tensor that is none")
    return value


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    """Return the arguments of a node by the names of the parameters, in their order."""
    if len(node.args) > len(defaults) or any(name not in defaults for name in node.kwargs):
        raise UnsupportedError(f"arguments of {node.target}")
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return [given.get(name, default) for name, default in defaults.items()]


def _shape(args: Sequence[Any]) -> Sequence[Any]:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


_MISSING: Any = object()


def _reshape(b: Builder, node: fx.Node) -> None:
    if node.kwargs:
        raise UnsupportedError("keywords of a shape")
    shape = _shape(node.args[1:])
    if any(isinstance(s, torch.dtype) for s in shape):
        raise UnsupportedError("a view as another dtype")
    b.are(node, b.step(Opcode.reshape, [b.array(node.args[0])], [b.number(s) for s in shape]))


def _flatten(b: Builder, node: fx.Node) -> None:
    x, start, end = _arguments(node, input=_MISSING, start_dim=0, end_dim=-1)
    dims = _tensor(x).dim()
    if not (isinstance(start, int) and isinstance(end, int)) or dims == 0:
        raise UnsupportedError("dimensions that are not known")
    start, end = start % dims, end % dims
    shape = _tensor(x).shape
    whole = [s if isinstance(s, int) else None for s in (*shape[:start], -1, *shape[end + 1 :])]
    if None in whole:
        raise UnsupportedError("sizes that are not known")
    b.are(node, b.step(Opcode.reshape, [b.array(x)], [b.number(s) for s in whole]))


def _transpose(b: Builder, node: fx.Node) -> None:
    x, i, j = _arguments(node, input=_MISSING, dim0=_MISSING, dim1=_MISSING)
    b.are(node, b.step(Opcode.transpose, [b.array(x)], [b.number(i), b.number(j)]))


def _unsqueeze(b: Builder, node: fx.Node) -> None:
    x, d = _arguments(node, input=_MISSING, dim=_MISSING)
    b.are(node, b.step(Opcode.unsqueeze, [b.array(x)], [b.number(d)]))


def _squeeze(b: Builder, node: fx.Node) -> None:
    x, d = _arguments(node, input=_MISSING, dim=_MISSING)
    b.are(node, b.step(Opcode.squeeze, [b.array(x)], [b.number(d)]))


def _select(b: Builder, node: fx.Node) -> None:
    x, d, i = _arguments(node, input=_MISSING, dim=_MISSING, index=_MISSING)
    b.are(node, b.step(Opcode.select, [b.array(x)], [b.number(d), b.number(i)]))


def _contiguous(b: Builder, node: fx.Node) -> None:
    (x,) = _arguments(node, input=_MISSING)
    b.are(node, b.step(Opcode.contiguous, [b.array(x)]))


def _split(b: Builder, node: fx.Node) -> None:
    x, sizes, d = _arguments(node, tensor=_MISSING, split_size_or_sections=_MISSING, dim=0)
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(s, int) for s in sizes):
        raise UnsupportedError("sizes that are not known")
    array, at, parts = b.array(x), 0, []
    for size in sizes:
        parts += b.step(Opcode.slice, [array], [b.number(d), (at, -1), (at + size, -1)])
        at += size
    b._several[node] = parts


def _getitem(b: Builder, node: fx.Node) -> None:
    x, index = node.args
    if not isinstance(x, fx.Node):
        raise UnsupportedError("an index of something else")
    if isinstance(index, int) and not isinstance(_value(x), Tensor):
        if not b.is_inside(x):
            raise UnsupportedError("one of several values")
        b.are(node, [b.one_of(x, index)])
        return
    items = index if isinstance(index, tuple) else (index,)
    dims = _tensor(x).dim()
    taken = sum(i is not None and i is not Ellipsis for i in items)
    array, d = b.array(x), 0
    for item in items:
        if item is Ellipsis:
            d += dims - taken
        elif item is None:
            (array,) = b.step(Opcode.unsqueeze, [array], [(d, -1)])
            d += 1
        elif isinstance(item, slice):
            if item.step not in (None, 1):
                raise UnsupportedError("a slice with steps")
            begin = b.number(0 if item.start is None else item.start)
            end = b.number(_END if item.stop is None else item.stop)
            if (item.start, item.stop) != (None, None):
                (array,) = b.step(Opcode.slice, [array], [(d, -1), begin, end])
            d += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            (array,) = b.step(Opcode.select, [array], [(d, -1), (item, -1)])
        elif isinstance(item, fx.Node) and _is_list_of_places(item) and sum(isinstance(i, fx.Node) for i in items) == 1:
            (array,) = b.step(Opcode.index_select, [array, b.array(item)], [(d, -1)])
            d += 1
        else:
            raise UnsupportedError("an index of another kind")
    b.are(node, [array])


def _is_list_of_places(node: fx.Node) -> bool:
    value = _tensor(node)
    return value.dtype is torch.int64 and value.dim() == 1


def _linear(b: Builder, node: fx.Node) -> None:
    x, handle, _ = node.args
    b.are(node, b.step(Opcode.linear, [b.array(x)], packed=b.packed(handle)))


def _head_linear(b: Builder, node: fx.Node) -> None:
    x, handle, _ = node.args
    b.are(node, b.step(Opcode.head_linear, [b.array(x)], packed=b.packed(handle)))


def _moe(b: Builder, node: fx.Node) -> None:
    x, ids, weights, handle = node.args
    if _tensor(ids).dtype is not torch.int64:
        raise UnsupportedError("ids of another dtype")
    arrays = [b.array(n) for n in (x, ids, weights)]
    b.are(node, b.step(Opcode.moe, arrays, packed=b.packed(handle)))


def _norm(b: Builder, node: fx.Node) -> None:
    x, weight, epsilon, offset, round_first = _arguments(
        node, x=_MISSING, weight=_MISSING, epsilon=_MISSING, offset=0.0, round_first=False
    )
    real = [b.real(epsilon), b.real(offset)]
    b.are(node, b.step(Opcode.norm, [b.array(x), b.array(weight)], [(int(round_first), -1)], real))


def _add_norm(b: Builder, node: fx.Node) -> None:
    x, addend, weight, epsilon, offset, round_first = _arguments(
        node, x=_MISSING, addend=_MISSING, weight=_MISSING, epsilon=_MISSING, offset=0.0, round_first=False
    )
    arrays = [b.array(n) for n in (x, addend, weight)]
    real = [b.real(epsilon), b.real(offset)]
    b.are(node, b.step(Opcode.add_norm, arrays, [(int(round_first), -1)], real, outs=2))


def _rotary(b: Builder, node: fx.Node) -> None:
    x, cos, sin, weight, epsilon, offset, round_first = _arguments(
        node, x=_MISSING, cos=_MISSING, sin=_MISSING, norm_weight=None, epsilon=0.0, offset=0.0, round_first=False
    )
    arrays = [b.array(n) for n in (x, cos, sin, weight) if n is not None]
    b.are(node, b.step(Opcode.rotary, arrays, [(int(round_first), -1)], [b.real(epsilon), b.real(offset)]))


def _attention(b: Builder, node: fx.Node) -> None:
    query, key, value, mask, sinks, lengths, causal, first, window, scale, softcap, isa, *kv_scales = node.args
    if lengths is not None or isa is not None or any(s is not None for s in kv_scales) or not isinstance(causal, bool):
        raise UnsupportedError("attention with lengths, or on codes")
    if sinks is not None and _tensor(sinks).dtype is not torch.float32:
        raise UnsupportedError("sinks of another dtype")
    arrays = [b.array(n) for n in (query, key, value, mask, sinks) if n is not None]
    extra = (1 if mask is not None else 0) | (2 if sinks is not None else 0)
    whole = [(int(causal), -1), b.number(-1 if first is None else first), b.number(window or 0), (extra, -1)]
    real = [b.real(0.0 if scale is None else scale), b.real(softcap or 0.0)]
    b.are(node, b.step(Opcode.attention, arrays, whole, real))


def _cached_attention(b: Builder, node: fx.Node) -> None:
    *tensors, sinks, window, scale, softcap = node.args
    key_blocks, key_scales, key, value = tensors[0], tensors[2], *tensors[5:7]
    if key_scales is None and _tensor(key_blocks).dtype != _tensor(key).dtype:
        raise UnsupportedError("keys are stored in another dtype")
    if sinks is not None and _tensor(sinks).dtype is not torch.float32:
        raise UnsupportedError("sinks of another dtype")
    arrays = [b.array(n) for n in (*tensors, sinks) if n is not None]
    extra = sum(bit for bit, x in ((1, key_scales), (2, sinks), (4, value)) if x is not None)
    real = [b.real(0.0 if scale is None else scale), b.real(softcap or 0.0)]
    b.are(node, b.step(Opcode.cached_attention, arrays, [b.number(window or 0), (extra, -1)], real))


def _elementwise(
    b: Builder, node: fx.Node, op: ElementOp, inputs: Sequence[Any], dtype: torch.dtype | None = None
) -> None:
    """Add an operation on one tensor, or on two of one dtype of which the second has as many elements in a row, or
    one."""
    first = _tensor(inputs[0])
    result = dtype or first.dtype
    if any(_tensor(x).dtype not in FLOAT_DTYPES for x in inputs) or result not in FLOAT_DTYPES or first.dim() == 0:
        raise UnsupportedError("elements of another dtype")
    if len(inputs) == 2:
        second = _tensor(inputs[1])
        same = same_sizes(second.shape, first.shape)
        single = same_sizes(second.shape, (*first.shape[:-1], 1))
        if second.dtype != first.dtype or not (same or single):
            raise UnsupportedError("tensors that do not fit")
    whole = [(_ELEMENT_OPS.index(op), -1), (_ELEMENTS.index(ELEMENTS[result]), -1)]
    b.are(node, b.step(Opcode.elementwise, [b.array(x) for x in inputs], whole))


_ELEMENT_OPS = [
    ElementOp.copy, ElementOp.add, ElementOp.sub, ElementOp.mul, ElementOp.div, ElementOp.silu, ElementOp.sigmoid,
    ElementOp.gelu_tanh, ElementOp.gelu_erf,
]  # fmt: skip
_ELEMENTS = list(ELEMENTS.values())


def _ends_with_one(x: Any) -> bool:
    return same_sizes(_tensor(x).shape[-1:], (1,))


def _binary(op: ElementOp) -> Callable[[Builder, fx.Node], None]:
    def add(b: Builder, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs:
            raise UnsupportedError("an operation with more arguments")
        x, y = node.args
        # The second may be the smaller one.
        if op in (ElementOp.add, ElementOp.mul) and _ends_with_one(x) and not _ends_with_one(y):
            x, y = y, x
        _elementwise(b, node, op, (x, y))

    return add


def _fresh_in_place(b: Builder, node: fx.Node) -> None:
    if not _is_fresh(node):
        raise UnsupportedError("a change of what others see")
    _elementwise(b, node, _FRESH_IN_PLACE[node.target], node.args)  # type: ignore[index]


def _silu(b: Builder, node: fx.Node) -> None:
    x, inplace = _arguments(node, input=_MISSING, inplace=False)
    if inplace:
        raise UnsupportedError("a change of what others see")
    _elementwise(b, node, ElementOp.silu, (x,))


def _sigmoid(b: Builder, node: fx.Node) -> None:
    _elementwise(b, node, ElementOp.sigmoid, _arguments(node, input=_MISSING))


def _gelu(b: Builder, node: fx.Node) -> None:
    x, approximate = _arguments(node, input=_MISSING, approximate="none")
    _elementwise(b, node, ElementOp.gelu_tanh if approximate == "tanh" else ElementOp.gelu_erf, (x,))


def _to(b: Builder, node: fx.Node) -> None:
    """A change of dtype, among floats."""
    wanted = [*node.args[1:], *node.kwargs.values()]
    if set(node.kwargs) - {"dtype"} or len(wanted) != 1 or not isinstance(wanted[0], torch.dtype):
        raise UnsupportedError("a move to somewhere else")
    _elementwise(b, node, ElementOp.copy, (node.args[0],), wanted[0])


def _float(b: Builder, node: fx.Node) -> None:
    _elementwise(b, node, ElementOp.copy, _arguments(node, input=_MISSING), torch.float32)


def _is_last(x: Any, d: Any) -> bool:
    return isinstance(d, int) and _tensor(x).dim() > 0 and d in (-1, _tensor(x).dim() - 1)


def _softmax(b: Builder, node: fx.Node) -> None:
    # `_stacklevel` is a parameter of torch.nn.functional's alone.
    names = {"input": _MISSING, "dim": None} | ({"_stacklevel": 3} if node.target is F.softmax else {})
    x, d, *_, dtype = _arguments(node, **names, dtype=None)
    value = _tensor(x)
    if (dtype or value.dtype) is not torch.float32 or value.dtype not in FLOAT_DTYPES or not _is_last(x, d):
        raise UnsupportedError("a softmax of another kind")
    b.are(node, b.step(Opcode.softmax, [b.array(x)]))


def _topk(b: Builder, node: fx.Node) -> None:
    x, k, d, largest, _ = _arguments(node, input=_MISSING, k=_MISSING, dim=-1, largest=True, sorted=True)
    if _tensor(x).dtype is not torch.float32 or not _is_last(x, d) or largest is not True:
        raise UnsupportedError("a topk of another kind")
    b.are(node, b.step(Opcode.top_k, [b.array(x)], [b.number(k)], outs=2))


def _sum(b: Builder, node: fx.Node) -> None:
    x, d, keepdim = _arguments(node, input=_MISSING, dim=None, keepdim=False)
    if _tensor(x).dtype is not torch.float32 or not _is_last(x, d) or keepdim is not True:
        raise UnsupportedError("a sum of another kind")
    b.are(node, b.step(Opcode.row_sum, [b.array(x)]))


def _cat(b: Builder, node: fx.Node) -> None:
    parts, d = _arguments(node, tensors=_MISSING, dim=0)
    if not isinstance(parts, (tuple, list)) or not parts:
        raise UnsupportedError("tensors that are not listed")
    values = [_tensor(p) for p in parts]
    if any(v.dtype != values[0].dtype or v.dim() != values[0].dim() for v in values):
        raise UnsupportedError("tensors that differ")
    b.are(node, b.step(Opcode.concat, [b.array(p) for p in parts], [b.number(d)]))


def _index_copy(b: Builder, node: fx.Node) -> None:
    into, d, index, source = _arguments(node, input=_MISSING, dim=_MISSING, index=_MISSING, source=_MISSING)
    if _tensor(index).dtype is not torch.int64 or _tensor(into).dtype != _tensor(source).dtype:
        raise UnsupportedError("a copy between dtypes")
    arrays = [b.array(n) for n in (into, index, source)]
    b.are(node, b.step(Opcode.index_copy, arrays, [b.number(d)]))


_HANDLERS: dict[object, Callable[[Builder, fx.Node], None]] = {
    "view": _reshape,
    "reshape": _reshape,
    torch.reshape: _reshape,
    "flatten": _flatten,
    torch.flatten: _flatten,
    "transpose": _transpose,
    torch.transpose: _transpose,
    "unsqueeze": _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    "squeeze": _squeeze,
    torch.squeeze: _squeeze,
    "select": _select,
    "contiguous": _contiguous,
    torch.split: _split,
    torch.functional.split: _split,
    operator.getitem: _getitem,
    torch.ops.kt.linear.default: _linear,
    torch.ops.kt.head_linear.default: _head_linear,
    torch.ops.kt.moe.default: _moe,
    torch.ops.kt.rms_norm.default: _norm,
    torch.ops.kt.add_rms_norm.default: _add_norm,
    torch.ops.kt.rotary.default: _rotary,
    torch.ops.kt.attention.default: _attention,
    torch.ops.kt.cached_attention.default: _cached_attention,
    operator.add: _binary(ElementOp.add),
    operator.sub: _binary(ElementOp.sub),
    operator.mul: _binary(ElementOp.mul),
    operator.truediv: _binary(ElementOp.div),
    **dict.fromkeys(_FRESH_IN_PLACE, _fresh_in_place),
    F.silu: _silu,
    torch.sigmoid: _sigmoid,
    "sigmoid": _sigmoid,
    F.gelu: _gelu,
    "to": _to,
    "float": _float,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    "softmax": _softmax,
    torch.topk: _topk,
    "topk": _topk,
    "sum": _sum,
    torch.sum: _sum,
    torch.cat: _cat,
    "index_copy_": _index_copy,
}
