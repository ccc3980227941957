"""Replaces each rotary embedding by one `kt::rotary`, with the normalisation of the heads before it, if there is one.

What is looked for is x * cos + cat((-x2, x1)) * sin, with x1 and x2 the halves of x [sequences, heads, positions, head
size] or of a first part of it, to which the rest is joined again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

import ktcompile.ops.rotary  # noqa: F401  (defines kt::rotary)
from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.regions import value_of
from ktcompile.graph.report import CompileReport
from ktcompile.graph.shapes import same_sizes
from ktcompile.quant import FLOAT_DTYPES

_ADD, _MUL, _NEG = (operator.add, torch.add, "add"), (operator.mul, torch.mul, "mul"), (operator.neg, torch.neg, "neg")
_CAT = (torch.cat, torch.concat, torch.concatenate)


class _Rotation(NamedTuple):
    """result: what is replaced. x: heads, whole. cos, sin: [sequences or 1, 1, positions, rotated]."""

    result: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def fuse_rotary(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
    """Return how many were replaced."""
    if needs_gradients(example_inputs):
        return 0
    found = [r for n in list(gm.graph.nodes) if (r := _rotation(n)) is not None and _fits(r)]
    for rotation in found:
        _replace(gm, rotation)
    for rotation in found:
        _erase_unused(gm, rotation.result)
    return len(found)


def _rotation(node: fx.Node) -> _Rotation | None:
    """Return the embedding that a sum is the end of."""
    if node.target not in _ADD or len(node.args) != 2 or node.kwargs:
        return None
    for plain, turned in (node.args, node.args[::-1]):
        straight, crossed = _factors(plain), _factors(turned)
        if straight is None or crossed is None:
            continue
        for x, cos in (straight, straight[::-1]):
            for halves, sin in (crossed, crossed[::-1]):
                if _swapped(halves, x):
                    return _whole(_Rotation(node, x, cos, sin))
    return None


def _factors(node: object) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target not in _MUL or len(node.args) != 2:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _swapped(node: fx.Node, x: fx.Node) -> bool:
    """Return whether `node` is cat((-x2, x1), -1) of the halves of `x`."""
    parts = _joined(node)
    size = _last_size(x)
    if parts is None or len(parts) != 2 or size is None or size % 2:
        return False
    negative, first = parts
    if negative.target not in _NEG or not isinstance(second := negative.args[0], fx.Node):
        return False
    return _is_part(first, x, 0, size // 2, size) and _is_part(second, x, size // 2, size, size)


def _whole(rotation: _Rotation) -> _Rotation:
    """Return the rotation of whole heads of which only a part is rotated, if it is one."""
    rotated, joined = _last_size(rotation.x), [u for u in rotation.result.users if u.target in _CAT]
    if len(rotation.result.users) != 1 or len(joined) != 1 or rotated is None:
        return rotation
    parts = _joined(joined[0])
    if parts is None or len(parts) != 2 or parts[0] is not rotation.result:
        return rotation
    for whole in rotation.x.all_input_nodes + parts[1].all_input_nodes:
        size = _last_size(whole)
        if size is None or not _is_part(rotation.x, whole, 0, rotated, size):
            continue
        if _is_part(parts[1], whole, rotated, size, size):
            return rotation._replace(result=joined[0], x=whole)
    return rotation


def _joined(node: fx.Node) -> list[fx.Node] | None:
    """Return what `node` joins along the last dimension."""
    if node.target not in _CAT or not node.args or not isinstance(node.args[0], (tuple, list)):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or dim not in (-1, value.dim() - 1):
        return None
    parts = [part for part in node.args[0] if isinstance(part, fx.Node)]
    return parts if len(parts) == len(node.args[0]) else None


def _is_part(node: fx.Node, whole: fx.Node, begin: int, end: int, size: int) -> bool:
    """Return whether `node` is whole[..., begin:end], of `size` elements."""
    if node.target is not operator.getitem or node.args[0] is not whole:
        return False
    index = node.args[1]
    if not isinstance(index, tuple) or index[0] is not Ellipsis or len(index) != 2 or not isinstance(index[1], slice):
        return False
    given = (index[1].start, index[1].stop, index[1].step)
    if any(x is not None and not isinstance(x, int) for x in given):
        return False
    return index[1].indices(size) == (begin, end, 1)


def _last_size(node: fx.Node) -> int | None:
    value = value_of(node)
    size = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() == 4 else None
    return size if isinstance(size, int) else None


def _fits(rotation: _Rotation) -> bool:
    """Return whether the operator takes these tensors."""
    x, cos, sin, result = (value_of(n) for n in (rotation.x, rotation.cos, rotation.sin, rotation.result))
    if not all(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in (x, cos, sin)):
        return False
    if x.dtype not in FLOAT_DTYPES or not x.dtype == cos.dtype == sin.dtype == result.dtype:
        return False
    # One sequence's angles may stand for all; nothing else is broadcast.
    if x.dim() != 4 or cos.dim() != 4:
        return False
    wanted = [(b, 1, x.shape[2], cos.shape[3]) for b in (1, x.shape[0])]
    return (
        any(same_sizes(cos.shape, w) for w in wanted)
        and same_sizes(sin.shape, cos.shape)
        and same_sizes(x.shape, result.shape)
    )


def _replace(gm: fx.GraphModule, rotation: _Rotation) -> None:
    x, norm = _before_norm(gm, rotation)
    with gm.graph.inserting_before(rotation.result):
        angles = [_without_heads(gm, n) for n in (rotation.cos, rotation.sin)]
        new = gm.graph.call_function(torch.ops.kt.rotary.default, (x, *angles, *norm))
    new.meta = dict(rotation.result.meta)
    rotation.result.replace_all_uses_with(new)


def _before_norm(gm: fx.GraphModule, rotation: _Rotation) -> tuple[fx.Node, tuple[Any, ...]]:
    """Return the heads as they are before a norm of which nothing else is used, and the norm's arguments."""
    x = rotation.x
    norm = x.args[0] if x.target == "transpose" and x.args[1:] in ((1, 2), (2, 1)) else x
    if not isinstance(norm, fx.Node) or norm.target is not torch.ops.kt.rms_norm.default:
        return x, ()
    source, *settings = norm.args
    if not isinstance(source, fx.Node) or (norm is not x and len(norm.users) > 1):
        return x, ()
    if norm is x:
        return source, tuple(settings)
    with gm.graph.inserting_before(rotation.result):
        heads = gm.graph.call_method("transpose", (source, 1, 2))
    heads.meta = dict(x.meta)
    return heads, tuple(settings)


def _erase_unused(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase what only served `node`. None of these operations changes a tensor."""
    pure = (*_ADD, *_MUL, *_NEG, *_CAT, operator.getitem, "transpose", "unsqueeze", torch.ops.kt.rms_norm.default)
    if node.users or node.target not in pure:
        return
    inputs = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in inputs:
        _erase_unused(gm, source)


def _without_heads(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return [sequences or 1, positions, rotated] of [sequences or 1, 1, positions, rotated]."""
    if node.target in ("unsqueeze", torch.unsqueeze) and node.args[1:] == (1,) and isinstance(node.args[0], fx.Node):
        return node.args[0]
    without = gm.graph.call_method("select", (node, 1, 0))
    without.meta["example_value"] = value_of(node).select(1, 0)
    return without
