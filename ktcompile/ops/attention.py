"""Softmax attention on the CPU: the operators `kt::attention` and `kt::paged_attention`.

Shape suffixes: B sequences, H heads of queries, J heads of keys, Q queries, S positions, D size of a key, V size of a
value, T queries of all sequences, N blocks, P positions of a block.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.machine import check_isa, machine
from ktcompile.ops.attention_checks import (
    check_blocks,
    check_dense,
    check_paged,
    check_queries,
    check_scales,
    counts,
    kv_dtype,
)
from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

for _schema in (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? lengths, bool causal,"
    " SymInt? first_position, SymInt? window, float? scale, float? softcap, str? isa,"
    " Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
    "paged_attention(Tensor query, Tensor key_blocks, Tensor value_blocks, Tensor block_table, Tensor lengths,"
    " Tensor query_starts, Tensor? sinks, SymInt? window, float? scale, float? softcap, str? isa,"
    " Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    first_position: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    isa: str | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Return softmax(softcap(query @ key.mT * scale) + mask) @ value, [B, H, Q, V] in the dtype of `query`.

    query: [B, H, Q, D]. key: [B, J, S, D] and value: [B, J, S, V], of one dtype; head h of the queries uses head
    h // (H // J). All fp32, fp16 or bf16; any strides, without a copy where the last dimension is contiguous.
    mask: bool, True where a query sees a key, or numbers to add; broadcast to [B, H, Q, S]. sinks: [H], a logit for
    each head that takes weight and has no value. lengths: int [B], positions of each sequence that exist, S where None.
    causal: a query sees its own position and those before; its position is first_position plus its place, or, where
    that is None, the queries are the last ones of the sequence. window: it sees that many of them. scale: D**-0.5 where
    None. softcap: scores become softcap * tanh(score / softcap). isa: whose kernels run; None is the best. key_scales,
    value_scales: float32 [B, J, S, G] where keys and values are int8 codes (`ktcompile.ops.kv`): G scales for a row,
    each of D // G elements, which is all of them or a multiple of 16. The bits are those of the fp32 keys and values
    that codes times scales are.

    A query that sees nothing gets zeros. What a query gets depends on itself and the keys that it sees alone, bit for
    bit: not on other queries and sequences, on the number of threads, or on where and in what steps keys are stored.
    ValueError: a shape, dtype or value cannot be used.
    """
    result: Tensor = torch.ops.kt.attention(
        query,
        key,
        value,
        mask,
        sinks,
        lengths,
        causal,
        first_position,
        window,
        scale,
        softcap,
        isa,
        key_scales,
        value_scales,
    )
    return result


def paged_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    sinks: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    isa: str | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Return the causal attention of the last queries of each sequence over keys and values in blocks, [T, H, V].

    query: [T, H, D]; sequence b has the queries [query_starts[b], query_starts[b + 1]), its last ones. key_blocks:
    [N, P, J, D] and value_blocks: [N, P, J, V]; value_blocks may be a part of key_blocks. block_table: int32
    [B, width]; position p of sequence b is in block block_table[b, p // P]; entries past its length are not read.
    lengths: int [B], positions of each sequence with those that are asked about. query_starts: int [B + 1]. key_scales,
    value_scales: float32 [N, P, J, G] for int8. The rest, and the bits of the result, are those of `attention`.
    ValueError: a shape, dtype or value cannot be used.
    """
    result: Tensor = torch.ops.kt.paged_attention(
        query,
        key_blocks,
        value_blocks,
        block_table,
        lengths,
        query_starts,
        sinks,
        window,
        scale,
        softcap,
        isa,
        key_scales,
        value_scales,
    )
    return result


@torch.library.impl(LIBRARY, "attention", "CPU")
def run(
    query_BHQD: Tensor,
    key_BJSD: Tensor,
    value_BJSV: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    first_position: int | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    isa: str | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    check_dense(query_BHQD, key_BJSD, value_BJSV)
    sequences, heads, queries, key_size = query_BHQD.shape
    kv_heads, positions, value_size = value_BJSV.shape[1:]
    if window is not None and not causal:
        raise ValueError(f"window is {window} without causal=True; a window ends at the query's own position")
    if first_position is not None and first_position < 0:
        raise ValueError(f"first_position is {first_position}; it must be 0 or more")
    if lengths is not None:
        lengths = counts("lengths", lengths, sequences, 0, positions)
    rule, sinks = _rule(heads, key_size, sinks, causal, window, scale, softcap)
    mask_place, mask_kind, mask = _mask(mask, (sequences, heads, queries, positions))
    key_scales, value_scales = (
        check_scales(name, x, scales)
        for name, x, scales in (("key", key_BJSD, key_scales), ("value", value_BJSV, value_scales))
    )
    query_BHQD, key_BJSD, value_BJSV = (_rows(x) for x in (query_BHQD, key_BJSD, value_BJSV))
    out_BHQV = query_BHQD.new_empty(sequences, queries, heads, value_size).transpose(1, 2)
    native_threads().context().attention(
        _isa(isa),
        (sequences, heads, kv_heads),
        (key_size, value_size),
        native_dtype(query_BHQD.dtype, "query"),
        kv_dtype(key_BJSD, "key"),
        _place(query_BHQD),
        _place(key_BJSD),
        _place(value_BJSV),
        _place(out_BHQV),
        (queries, positions, -1 if first_position is None else first_position, 0, _address(lengths)),
        (0, 0, 1),
        (mask_place, mask_kind),
        rule,
        _scales(key_scales, key_size),
        _scales(value_scales, value_size),
    )
    return out_BHQV


@torch.library.impl(LIBRARY, "paged_attention", "CPU")
def _paged_attention_cpu(
    query_THD: Tensor,
    key_NPJD: Tensor,
    value_NPJV: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    sinks: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    isa: str | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    check_paged(query_THD, key_NPJD, value_NPJV, block_table)
    tokens, heads, key_size = query_THD.shape
    block_size, kv_heads, value_size = value_NPJV.shape[1:]
    sequences, width = block_table.shape
    lengths = counts("lengths", lengths, sequences, 0, width * block_size)
    query_starts = counts("query_starts", query_starts, sequences + 1, 0, tokens)
    check_queries(query_starts, lengths, tokens)
    check_blocks(block_table, lengths, block_size, key_NPJD.shape[0])
    rule, sinks = _rule(heads, key_size, sinks, True, window, scale, softcap)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    key_scales, value_scales = (
        check_scales(name, x, scales)
        for name, x, scales in (("key_blocks", key_NPJD, key_scales), ("value_blocks", value_NPJV, value_scales))
    )
    query_THD, key_NPJD, value_NPJV = (_rows(x) for x in (query_THD, key_NPJD, value_NPJV))
    out_THV = query_THD.new_empty(tokens, heads, value_size)
    native_threads().context().attention(
        _isa(isa),
        (sequences, heads, kv_heads),
        (key_size, value_size),
        native_dtype(query_THD.dtype, "query"),
        kv_dtype(key_NPJD, "key_blocks"),
        (query_THD.data_ptr(), 0, query_THD.stride(1), query_THD.stride(0)),
        _place(key_NPJD.transpose(1, 2)),
        _place(value_NPJV.transpose(1, 2)),
        (out_THV.data_ptr(), 0, out_THV.stride(1), out_THV.stride(0)),
        (0, 0, -1, query_starts.data_ptr(), lengths.data_ptr()),
        (block_table.data_ptr(), block_table.stride(0), block_size),
        (_NOWHERE, _native.MaskType.none),
        rule,
        _scales(None if key_scales is None else key_scales.transpose(1, 2), key_size),
        _scales(None if value_scales is None else value_scales.transpose(1, 2), value_size),
    )
    return out_THV


@torch.library.register_fake("kt::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *others: object) -> Tensor:
    sequences, heads, queries, _ = query.shape
    return query.new_empty(sequences, queries, heads, value.shape[3]).transpose(1, 2)


@torch.library.register_fake("kt::paged_attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _paged_attention_fake(query: Tensor, key_blocks: Tensor, value_blocks: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value_blocks.shape[3])


for _name in ("attention", "paged_attention"):
    register_without_backward(_name)


_Place: TypeAlias = tuple[int, int, int, int]
_NOWHERE: _Place = (0, 0, 0, 0)
_MASKS = {
    torch.bool: _native.MaskType.boolean,
    torch.float32: _native.MaskType.f32,
    torch.float16: _native.MaskType.f16,
    torch.bfloat16: _native.MaskType.bf16,
}


def _place(x_BHQD: Tensor) -> _Place:
    return x_BHQD.data_ptr(), x_BHQD.stride(0), x_BHQD.stride(1), x_BHQD.stride(2)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _scales(scales_BJSG: Tensor | None, size: int) -> tuple[_Place, int]:
    """Return where scales are and how many elements of a row of `size` share one."""
    return (_NOWHERE, 0) if scales_BJSG is None else (_place(scales_BJSG), size // scales_BJSG.shape[3])


def _isa(name: str | None) -> str:
    return machine().isa if name is None else check_isa(name, machine().isas)


def _rule(
    heads: int,
    key_size: int,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[tuple[bool, int, float, float, int], Tensor | None]:
    """Return what the kernels are told, and the sinks, whose address is in it."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 position or more")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be more than 0")
    if sinks is not None:
        if sinks.shape != (heads,):
            raise ValueError(f"sinks is {list(sinks.shape)}; it must be [{heads}], one for each head of query")
        sinks = sinks.float().contiguous()
    scale = key_size**-0.5 if scale is None else scale
    return (causal, window or 0, scale, softcap or 0.0, _address(sinks)), sinks


def _mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[_Place, _native.MaskType, Tensor | None]:
    """Return the place and the kind of a mask, and the tensor that lies there."""
    if mask is None:
        return _NOWHERE, _native.MaskType.none, None
    if mask.dtype not in _MASKS:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be one of {', '.join(map(str, _MASKS))}")
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask is {list(mask.shape)}; it must broadcast to {list(shape)}")
    if mask.dim() == 0 or mask.shape[-1] != shape[-1]:
        mask = mask.expand(*mask.shape[:-1], shape[-1])
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    return _place(mask.expand(shape)), _MASKS[mask.dtype], mask
