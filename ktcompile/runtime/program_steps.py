"""From nodes of a graph to the steps of a `_native.Program`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ktcompile._native import Opcode
from ktcompile.quant import FLOAT_DTYPES
from ktcompile.runtime.program_builder import MISSING, Builder, UnsupportedError, arguments_of, tensor_of, value_of
from ktcompile.runtime.program_elements import ELEMENT_HANDLERS

_END = 2**62  # of a slice that goes to the end


def add_steps(builder: Builder, node: fx.Node) -> None:
    """Add the steps of a node. UnsupportedError: it has none."""
    handler = _HANDLERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if handler is None:
        raise UnsupportedError(str(node.target))
    handler(builder, node)


def _shape(args: Sequence[Any]) -> Sequence[Any]:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _reshape(b: Builder, node: fx.Node) -> None:
    if node.kwargs:
        raise UnsupportedError("keywords of a shape")
    shape = _shape(node.args[1:])
    if any(isinstance(s, torch.dtype) for s in shape):
        raise UnsupportedError("a view as another dtype")
    b.are(node, b.step(Opcode.reshape, [b.array(node.args[0])], [b.number(s) for s in shape]))


def _expand(b: Builder, node: fx.Node) -> None:
    if node.kwargs:
        raise UnsupportedError("keywords of a shape")
    b.are(node, b.step(Opcode.expand, [b.array(node.args[0])], [b.number(s) for s in _shape(node.args[1:])]))


def _flatten(b: Builder, node: fx.Node) -> None:
    x, start, end = arguments_of(node, input=MISSING, start_dim=0, end_dim=-1)
    dims = tensor_of(x).dim()
    if not (isinstance(start, int) and isinstance(end, int)) or dims == 0:
        raise UnsupportedError("dimensions that are not known")
    start, end = start % dims, end % dims
    shape = tensor_of(x).shape
    whole = [s if isinstance(s, int) else None for s in (*shape[:start], -1, *shape[end + 1 :])]
    if None in whole:
        raise UnsupportedError("sizes that are not known")
    b.are(node, b.step(Opcode.reshape, [b.array(x)], [b.number(s) for s in whole]))


def _transpose(b: Builder, node: fx.Node) -> None:
    x, i, j = arguments_of(node, input=MISSING, dim0=MISSING, dim1=MISSING)
    b.are(node, b.step(Opcode.transpose, [b.array(x)], [b.number(i), b.number(j)]))


def _unsqueeze(b: Builder, node: fx.Node) -> None:
    x, d = arguments_of(node, input=MISSING, dim=MISSING)
    b.are(node, b.step(Opcode.unsqueeze, [b.array(x)], [b.number(d)]))


def _squeeze(b: Builder, node: fx.Node) -> None:
    x, d = arguments_of(node, input=MISSING, dim=MISSING)
    b.are(node, b.step(Opcode.squeeze, [b.array(x)], [b.number(d)]))


def _select(b: Builder, node: fx.Node) -> None:
    x, d, i = arguments_of(node, input=MISSING, dim=MISSING, index=MISSING)
    b.are(node, b.step(Opcode.select, [b.array(x)], [b.number(d), b.number(i)]))


def _contiguous(b: Builder, node: fx.Node) -> None:
    (x,) = arguments_of(node, input=MISSING)
    b.are(node, b.step(Opcode.contiguous, [b.array(x)]))


def _split(b: Builder, node: fx.Node) -> None:
    x, sizes, d = arguments_of(node, tensor=MISSING, split_size_or_sections=MISSING, dim=0)
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
    if isinstance(index, int) and not isinstance(value_of(x), Tensor):
        if not b.is_inside(x):
            raise UnsupportedError("one of several values")
        b.are(node, [b.one_of(x, index)])
        return
    items = index if isinstance(index, tuple) else (index,)
    dims = tensor_of(x).dim()
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
    value = tensor_of(node)
    return value.dtype is torch.int64 and value.dim() == 1


def _linear(b: Builder, node: fx.Node) -> None:
    x, handle, _ = node.args
    b.are(node, b.step(Opcode.linear, [b.array(x)], packed=b.packed(handle)))


def _head_linear(b: Builder, node: fx.Node) -> None:
    x, handle, _ = node.args
    b.are(node, b.step(Opcode.head_linear, [b.array(x)], packed=b.packed(handle)))


def _moe(b: Builder, node: fx.Node) -> None:
    x, ids, weights, handle = node.args
    if tensor_of(ids).dtype is not torch.int64:
        raise UnsupportedError("ids of another dtype")
    arrays = [b.array(n) for n in (x, ids, weights)]
    b.are(node, b.step(Opcode.moe, arrays, packed=b.packed(handle)))


def _norm(b: Builder, node: fx.Node) -> None:
    x, weight, epsilon, offset, round_first = arguments_of(
        node, x=MISSING, weight=MISSING, epsilon=MISSING, offset=0.0, round_first=False
    )
    real = [b.real(epsilon), b.real(offset)]
    b.are(node, b.step(Opcode.norm, [b.array(x), b.array(weight)], [(int(round_first), -1)], real))


def _add_norm(b: Builder, node: fx.Node) -> None:
    x, addend, weight, epsilon, offset, round_first = arguments_of(
        node, x=MISSING, addend=MISSING, weight=MISSING, epsilon=MISSING, offset=0.0, round_first=False
    )
    arrays = [b.array(n) for n in (x, addend, weight)]
    real = [b.real(epsilon), b.real(offset)]
    b.are(node, b.step(Opcode.add_norm, arrays, [(int(round_first), -1)], real, outs=2))


def _rotary(b: Builder, node: fx.Node) -> None:
    x, cos, sin, weight, epsilon, offset, round_first = arguments_of(
        node, x=MISSING, cos=MISSING, sin=MISSING, norm_weight=None, epsilon=0.0, offset=0.0, round_first=False
    )
    arrays = [b.array(n) for n in (x, cos, sin, weight) if n is not None]
    b.are(node, b.step(Opcode.rotary, arrays, [(int(round_first), -1)], [b.real(epsilon), b.real(offset)]))


def _attention(b: Builder, node: fx.Node) -> None:
    query, key, value, mask, sinks, lengths, causal, first, window, scale, softcap, isa, *kv_scales = node.args
    if lengths is not None or isa is not None or any(s is not None for s in kv_scales) or not isinstance(causal, bool):
        raise UnsupportedError("attention with lengths, or on codes")
    if sinks is not None and tensor_of(sinks).dtype is not torch.float32:
        raise UnsupportedError("sinks of another dtype")
    arrays = [b.array(n) for n in (query, key, value, mask, sinks) if n is not None]
    extra = (1 if mask is not None else 0) | (2 if sinks is not None else 0)
    whole = [(int(causal), -1), b.number(-1 if first is None else first), b.number(window or 0), (extra, -1)]
    real = [b.real(0.0 if scale is None else scale), b.real(softcap or 0.0)]
    b.are(node, b.step(Opcode.attention, arrays, whole, real))


def _cached_attention(b: Builder, node: fx.Node) -> None:
    *tensors, sinks, window, scale, softcap = node.args
    key_blocks, key_scales, key, value = tensors[0], tensors[2], *tensors[5:7]
    if key_scales is None and tensor_of(key_blocks).dtype != tensor_of(key).dtype:
        raise UnsupportedError("keys are stored in another dtype")
    if sinks is not None and tensor_of(sinks).dtype is not torch.float32:
        raise UnsupportedError("sinks of another dtype")
    arrays = [b.array(n) for n in (*tensors, sinks) if n is not None]
    extra = sum(bit for bit, x in ((1, key_scales), (2, sinks), (4, value)) if x is not None)
    real = [b.real(0.0 if scale is None else scale), b.real(softcap or 0.0)]
    b.are(node, b.step(Opcode.cached_attention, arrays, [b.number(window or 0), (extra, -1)], real))


def _is_last(x: Any, d: Any) -> bool:
    return isinstance(d, int) and tensor_of(x).dim() > 0 and d in (-1, tensor_of(x).dim() - 1)


def _softmax(b: Builder, node: fx.Node) -> None:
    # `_stacklevel` is a parameter of torch.nn.functional's alone.
    names = {"input": MISSING, "dim": None} | ({"_stacklevel": 3} if node.target is F.softmax else {})
    x, d, *_, dtype = arguments_of(node, **names, dtype=None)
    value = tensor_of(x)
    if (dtype or value.dtype) is not torch.float32 or value.dtype not in FLOAT_DTYPES or not _is_last(x, d):
        raise UnsupportedError("a softmax of another kind")
    b.are(node, b.step(Opcode.softmax, [b.array(x)]))


def _topk(b: Builder, node: fx.Node) -> None:
    x, k, d, largest, _ = arguments_of(node, input=MISSING, k=MISSING, dim=-1, largest=True, sorted=True)
    if tensor_of(x).dtype is not torch.float32 or not _is_last(x, d) or largest is not True:
        raise UnsupportedError("a topk of another kind")
    b.are(node, b.step(Opcode.top_k, [b.array(x)], [b.number(k)], outs=2))


def _sum(b: Builder, node: fx.Node) -> None:
    x, d, keepdim = arguments_of(node, input=MISSING, dim=None, keepdim=False)
    if tensor_of(x).dtype is not torch.float32 or not _is_last(x, d) or keepdim is not True:
        raise UnsupportedError("a sum of another kind")
    b.are(node, b.step(Opcode.row_sum, [b.array(x)]))


def _cat(b: Builder, node: fx.Node) -> None:
    parts, d = arguments_of(node, tensors=MISSING, dim=0)
    if not isinstance(parts, (tuple, list)) or not parts:
        raise UnsupportedError("tensors that are not listed")
    values = [tensor_of(p) for p in parts]
    if any(v.dtype != values[0].dtype or v.dim() != values[0].dim() for v in values):
        raise UnsupportedError("tensors that differ")
    b.are(node, b.step(Opcode.concat, [b.array(p) for p in parts], [b.number(d)]))


def _index_copy(b: Builder, node: fx.Node) -> None:
    into, d, index, source = arguments_of(node, input=MISSING, dim=MISSING, index=MISSING, source=MISSING)
    if tensor_of(index).dtype is not torch.int64 or tensor_of(into).dtype != tensor_of(source).dtype:
        raise UnsupportedError("a copy between dtypes")
    arrays = [b.array(n) for n in (into, index, source)]
    b.are(node, b.step(Opcode.index_copy, arrays, [b.number(d)]))


_HANDLERS: dict[object, Callable[[Builder, fx.Node], None]] = {
    "view": _reshape,
    "reshape": _reshape,
    torch.reshape: _reshape,
    "expand": _expand,
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
    **ELEMENT_HANDLERS,
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
