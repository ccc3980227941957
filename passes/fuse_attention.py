"""Replaces each `scaled_dot_product_attention` on the CPU by `kt::attention`.

Keys and values that were repeated for each head of queries are read as they were before. Changes numbers: weights stay
in fp32 and sums run in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

import ktcompile.ops.attention  # noqa: F401  (defines kt::attention)
from ktcompile.config import CompileOptions
from ktcompile.graph.gradients import needs_gradients
from ktcompile.graph.report import CompileReport
from ktcompile.log import warn_once
from ktcompile.quant import FLOAT_DTYPES

_TARGET = torch.nn.functional.scaled_dot_product_attention


class _Call(NamedTuple):
    """The arguments of a `scaled_dot_product_attention`, by their names there."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def fuse_attention(
    options: CompileOptions,
) -> Callable[[fx.GraphModule, Sequence[object], CompileReport], int]:
    """Return the pass for `options`, whose ISA holds for every call."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[object], report: CompileReport) -> int:
        """Return how many calls were replaced. The others are left as they are, with the reason."""
        trained = needs_gradients(example_inputs)
        replaced = 0
        for node in [n for n in gm.graph.nodes if n.target is _TARGET]:
            call = _Call(*node.args, **node.kwargs)
            reason = "gradients are enabled; the fused attention only runs forward" if trained else _why_not(call)
            if reason:
                why = f"{node.name}: {reason}"
                report.attention_fallbacks.append(why)
                warn_once(f"left to scaled_dot_product_attention: {why}")
            else:
                _replace(gm, node, call, options.isa)
                replaced += 1
        report.attention_fused = sum(str(n.target) == "kt.attention.default" for n in gm.graph.nodes)
        return replaced

    return run


def _why_not(call: _Call) -> str:
    """Return why a call is not for the kernels; empty where it is."""
    tensors = [_value(x) for x in (call.query, call.key, call.value)]
    if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in tensors):
        return "query, key and value are not all of [sequences, heads, positions, head size]"
    query, key, value = tensors
    if any(t.device.type != "cpu" for t in tensors):
        return f"its tensors are on {query.device}"
    if query.dtype not in FLOAT_DTYPES or key.dtype != value.dtype:
        return f"its tensors are {query.dtype}, {key.dtype} and {value.dtype}"
    if not isinstance(call.dropout_p, (int, float)) or call.dropout_p:
        return f"dropout_p is {call.dropout_p}"
    if not isinstance(call.is_causal, bool) or (call.is_causal and call.attn_mask is not None):
        return "is_causal is not known, or stands beside a mask"
    if call.scale is not None and not isinstance(_number(call.scale), (int, float, torch.SymFloat)):
        return f"scale is {call.scale}"
    heads, kv_heads = query.shape[1], key.shape[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and value.shape[1] == kv_heads):
        return f"query has {heads} heads, key {kv_heads} and value {value.shape[1]}"
    if heads % kv_heads or (heads != kv_heads and call.enable_gqa is not True):
        return f"query has {heads} heads and key {kv_heads}, without enable_gqa"
    if not all(statically_known_true(query.shape[0] == t.shape[0]) for t in (key, value)):
        return "query, key and value have not the same number of sequences"
    mask = _value(call.attn_mask)
    if mask is not None and (mask.dim() < 2 or mask.dtype not in (torch.bool, *FLOAT_DTYPES)):
        return f"its mask is {list(mask.shape)} of {mask.dtype}"
    return ""


def _replace(gm: fx.GraphModule, node: fx.Node, call: _Call, isa: str | None) -> None:
    key, value = _unrepeated(call.key), _unrepeated(call.value)
    if _value(key).shape[1] != _value(value).shape[1]:
        key, value = call.key, call.value
    # Here the causal rule counts queries and keys from the same first position.
    first_position = 0 if call.is_causal else None
    arguments = (call.query, key, value, call.attn_mask, None, None, call.is_causal, first_position, None, call.scale)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(torch.ops.kt.attention.default, (*arguments, None, isa))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    for repeated, source in ((call.key, key), (call.value, value)):
        if repeated is not source:
            _erase_unused(gm, repeated, source)


def _unrepeated(node: fx.Node) -> fx.Node:
    """Return what `x[:, :, None].expand(...).reshape(...)` repeats along the heads, or the node itself."""
    reshape, expand = node, _first_argument(node)
    inserted = _first_argument(expand)
    source = _first_argument(inserted)
    if (
        reshape.target not in ("reshape", "flatten", torch.reshape)
        or expand is None
        or expand.target != "expand"
        or inserted is None
        or source is None
        or not _inserts_a_dimension(inserted)
    ):
        return node
    before, after, repeated = _value(source).shape, _value(node).shape, _value(expand).shape
    if len(before) != 4 or len(after) != 4 or len(repeated) != 5:
        return node
    b, h, s, d = before
    wanted = ((b, h, repeated[2], s, d), (b, h * repeated[2], s, d))
    fits = all(
        statically_known_true(x == y)
        for shape, like in zip((repeated, after), wanted, strict=True)
        for x, y in zip(shape, like, strict=True)
    )
    return source if fits else node


def _inserts_a_dimension(node: fx.Node) -> bool:
    if node.target == "unsqueeze":
        return node.args[1:] == (2,)
    everything = slice(None, None, None)
    index = node.args[1] if len(node.args) == 2 else None
    if str(node.target) != "<built-in function getitem>" or not isinstance(index, tuple) or len(index) < 3:
        return False
    return index[:3] == (everything, everything, None) and all(i == everything for i in index[3:])


def _first_argument(node: fx.Node | None) -> fx.Node | None:
    first = node.args[0] if node is not None and node.args else None
    return first if isinstance(first, fx.Node) else None


def _erase_unused(gm: fx.GraphModule, node: fx.Node, until: fx.Node) -> None:
    while node is not until and not node.users:
        previous = _first_argument(node)
        assert previous is not None
        gm.graph.erase_node(node)
        node = previous


def _number(x: Any) -> Any:
    """A constant, or what Dynamo recorded for one that it made an input."""
    return _value(x) if isinstance(x, fx.Node) else x


def _value(node: Any) -> Any:
    """The fake value that Dynamo recorded for a node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None
