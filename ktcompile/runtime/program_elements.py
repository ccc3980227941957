"""Steps that compute one element from one or two, and those that make integers or look rows up."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ktcompile._native import ElementOp, IntegerOp, Opcode
from ktcompile.graph.shapes import same_sizes
from ktcompile.quant import FLOAT_DTYPES
from ktcompile.runtime.program_builder import (
    ELEMENTS,
    FRESH_IN_PLACE,
    MISSING,
    Builder,
    UnsupportedError,
    arguments_of,
    is_fresh,
    tensor_of,
    value_of,
)

_ELEMENT_OPS = [
    ElementOp.copy, ElementOp.add, ElementOp.sub, ElementOp.mul, ElementOp.div, ElementOp.silu, ElementOp.sigmoid,
    ElementOp.gelu_tanh, ElementOp.gelu_erf, ElementOp.cos, ElementOp.sin,
]  # fmt: skip
_ELEMENTS = list(ELEMENTS.values())
_INTEGER_OPS = [
    IntegerOp.add, IntegerOp.sub, IntegerOp.mul, IntegerOp.le, IntegerOp.lt, IntegerOp.ge, IntegerOp.gt,
    IntegerOp.conjunction,
]  # fmt: skip


def _elementwise(
    b: Builder,
    node: fx.Node,
    op: ElementOp,
    inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    number: Any = None,
) -> None:
    """Add an operation on one tensor of floats, on two of one dtype, or on one and a number."""
    first = tensor_of(inputs[0])
    result = dtype or first.dtype
    if any(tensor_of(x).dtype != first.dtype for x in inputs) or all(tensor_of(x).dim() == 0 for x in inputs):
        raise UnsupportedError("tensors that do not fit")
    if first.dtype not in FLOAT_DTYPES or result not in FLOAT_DTYPES:
        raise UnsupportedError("elements of another dtype")
    if number is not None and first.dtype is not torch.float32 and op not in (ElementOp.mul, ElementOp.div):
        raise UnsupportedError("a sum with a number, which torch rounds first")
    real = [] if number is None else [b.real(number)]
    b.are(node, b.step(Opcode.elementwise, [b.array(x) for x in inputs], _numbers(op, result), real))


def _numbers(op: ElementOp, result: torch.dtype) -> list[tuple[int, int]]:
    return [(_ELEMENT_OPS.index(op), -1), (_ELEMENTS.index(ELEMENTS[result]), -1)]


def _integers(b: Builder, node: fx.Node, op: IntegerOp, x: Any, y: Any) -> None:
    """Add an operation on two tensors of integers, or on one and a number."""
    inputs = [n for n in (x, y) if _is_tensor(n)]
    dtype = torch.bool if op is IntegerOp.conjunction else torch.int64
    if not _is_tensor(x) or any(tensor_of(n).dtype is not dtype for n in inputs):
        raise UnsupportedError("integers of another dtype")
    number = [] if len(inputs) == 2 else [b.number(y)]
    b.are(node, b.step(Opcode.integers, [b.array(n) for n in inputs], [(_INTEGER_OPS.index(op), -1), *number]))


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(value_of(x), Tensor)


def _one_in_a_row(x: Any) -> bool:
    return tensor_of(x).dim() == 0 or same_sizes(tensor_of(x).shape[-1:], (1,))


def _binary(op: ElementOp, integer_op: IntegerOp | None = None) -> Callable[[Builder, fx.Node], None]:
    def add(b: Builder, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs:
            raise UnsupportedError("an operation with more arguments")
        x, y = node.args
        commutes = op in (ElementOp.add, ElementOp.mul)
        if commutes and not _is_tensor(x):
            x, y = y, x
        if integer_op is not None and tensor_of(x).dtype is torch.int64:
            _integers(b, node, integer_op, x, y)
        elif _is_tensor(y):
            # The second may be the one that has one element for each row.
            _elementwise(b, node, op, (y, x) if commutes and _one_in_a_row(x) and not _one_in_a_row(y) else (x, y))
        else:
            _elementwise(b, node, op, (x,), number=y)

    return add


def _of_integers(op: IntegerOp) -> Callable[[Builder, fx.Node], None]:
    def add(b: Builder, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs:
            raise UnsupportedError("an operation with more arguments")
        _integers(b, node, op, *node.args)

    return add


def _unary(op: ElementOp) -> Callable[[Builder, fx.Node], None]:
    def add(b: Builder, node: fx.Node) -> None:
        _elementwise(b, node, op, arguments_of(node, input=MISSING))

    return add


def _matmul(b: Builder, node: fx.Node) -> None:
    """All products of a column and a row, in each of which there is one term."""
    x, y = arguments_of(node, input=MISSING, other=MISSING)
    column, row = tensor_of(x), tensor_of(y)
    if column.dim() < 2 or row.dim() < 2 or not same_sizes((column.shape[-1], row.shape[-2]), (1, 1)):
        raise UnsupportedError("a product of matrices")
    if column.dtype is not torch.float32:
        raise UnsupportedError("a product in another dtype")
    _elementwise(b, node, ElementOp.mul, (y, x))


def _fresh_in_place(b: Builder, node: fx.Node) -> None:
    if not is_fresh(node):
        raise UnsupportedError("a change of what others see")
    _elementwise(b, node, FRESH_IN_PLACE[node.target], node.args)  # type: ignore[index]


def _add_in_place(b: Builder, node: fx.Node) -> None:
    """A number that is added to a counter."""
    x, y = arguments_of(node, input=MISSING, other=MISSING)
    if tensor_of(x).dtype is not torch.int64 or tensor_of(x).dim() or _is_tensor(y):
        raise UnsupportedError("a change of what is no counter")
    b.are(node, b.step(Opcode.add_number, [b.array(x)], [b.number(y)]))


def _silu(b: Builder, node: fx.Node) -> None:
    x, inplace = arguments_of(node, input=MISSING, inplace=False)
    if inplace:
        raise UnsupportedError("a change of what others see")
    _elementwise(b, node, ElementOp.silu, (x,))


def _gelu(b: Builder, node: fx.Node) -> None:
    x, approximate = arguments_of(node, input=MISSING, approximate="none")
    _elementwise(b, node, ElementOp.gelu_tanh if approximate == "tanh" else ElementOp.gelu_erf, (x,))


def _to(b: Builder, node: fx.Node) -> None:
    """A change of dtype, or none where what is asked for is there."""
    x, *rest = node.args
    wanted = [*rest, *node.kwargs.values()]
    dtypes = [w for w in wanted if isinstance(w, torch.dtype)]
    devices = [torch.device(w) for w in wanted if isinstance(w, (str, torch.device))]
    if set(node.kwargs) - {"dtype", "device"} or len(dtypes) + len(devices) < len(wanted):
        raise UnsupportedError("a move of another kind")
    if any(d.type != "cpu" for d in devices):
        raise UnsupportedError("a move to somewhere else")
    _cast(b, node, x, dtypes[0] if dtypes else tensor_of(x).dtype)


def _float(b: Builder, node: fx.Node) -> None:
    (x,) = arguments_of(node, input=MISSING)
    _cast(b, node, x, torch.float32)


def _cast(b: Builder, node: fx.Node, x: Any, dtype: torch.dtype) -> None:
    has = tensor_of(x).dtype
    if has is dtype:
        b.are(node, [b.array(x)])
    elif has is torch.int64 and dtype is torch.float32:
        b.are(node, b.step(Opcode.elementwise, [b.array(x)], _numbers(ElementOp.copy, dtype)))
    else:
        _elementwise(b, node, ElementOp.copy, (x,), dtype)


def _arange(b: Builder, node: fx.Node) -> None:
    value = tensor_of(node)
    if set(node.kwargs) - {"dtype", "device"} or not 1 <= len(node.args) <= 2:
        raise UnsupportedError("a range of another kind")
    if value.dtype is not torch.int64 or value.device.type != "cpu":
        raise UnsupportedError("a range of other numbers")
    b.are(node, b.step(Opcode.arange, [], [b.number(n) for n in (0, *node.args)[-2:]]))


def _embedding(b: Builder, node: fx.Node) -> None:
    # What is left is for gradients, or for a norm that is not asked for.
    ids, table, _, max_norm, *_ = arguments_of(
        node, input=MISSING, weight=MISSING, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False,
    )  # fmt: skip
    if max_norm is not None or tensor_of(ids).dtype is not torch.int64 or tensor_of(table).dim() != 2:
        raise UnsupportedError("an embedding of another kind")
    b.are(node, b.step(Opcode.embedding, [b.array(table), b.array(ids)]))


ELEMENT_HANDLERS: dict[object, Callable[[Builder, fx.Node], None]] = {
    operator.add: _binary(ElementOp.add, IntegerOp.add),
    operator.sub: _binary(ElementOp.sub, IntegerOp.sub),
    operator.mul: _binary(ElementOp.mul, IntegerOp.mul),
    operator.truediv: _binary(ElementOp.div),
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    "matmul": _matmul,
    operator.le: _of_integers(IntegerOp.le),
    operator.lt: _of_integers(IntegerOp.lt),
    operator.ge: _of_integers(IntegerOp.ge),
    operator.gt: _of_integers(IntegerOp.gt),
    operator.and_: _of_integers(IntegerOp.conjunction),
    "add_": _add_in_place,
    **dict.fromkeys(FRESH_IN_PLACE, _fresh_in_place),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), _unary(ElementOp.sigmoid)),
    **dict.fromkeys((torch.cos, "cos"), _unary(ElementOp.cos)),
    **dict.fromkeys((torch.sin, "sin"), _unary(ElementOp.sin)),
    F.silu: _silu,
    F.gelu: _gelu,
    "to": _to,
    "float": _float,
    torch.arange: _arange,
    F.embedding: _embedding,
}
