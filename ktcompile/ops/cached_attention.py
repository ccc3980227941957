"""Attention of one step of a server: the operator `kt::cached_attention` stores keys and values, then attends to them.

Without a value, as where latents are kept, the first elements of keys are the values: their blocks are a part of those
of keys.

Shape suffixes: T tokens of all sequences, H heads of queries, J heads of keys, N blocks, P positions of a block, D size
of a key, V size of a value, G groups of a row, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile.ops.kv import PagedKV
from ktcompile.ops.library import LIBRARY

LIBRARY.define(
    "cached_attention(Tensor(a!) key_blocks, Tensor(b!) value_blocks, Tensor(c!)? key_scales, Tensor(d!)? value_scales,"
    " Tensor query, Tensor key, Tensor? value, Tensor slot_mapping, Tensor block_table, Tensor lengths,"
    " Tensor query_starts, Tensor? sinks, SymInt? window, float? scale, float? softcap) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "cached_attention", "CPU")
def run(
    key_blocks_NPJD: Tensor,
    value_blocks_NPJV: Tensor,
    key_scales_NPJG: Tensor | None,
    value_scales_NPJG: Tensor | None,
    query_1HTD: Tensor,
    key_1JTD: Tensor,
    value_1JTV: Tensor | None,
    slot_mapping: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    sinks: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Write the keys and values of a step's tokens into their slots, and return its attention, [1, T, H, V].

    slot_mapping: as of `ktcompile.ops.kv.PagedKV.store`; the rest as of `ktcompile.ops.paged_attention`. A sequence may
    have no queries. ValueError: a shape, dtype or value cannot be used.
    """
    tensors = [x for x in (query_1HTD, key_1JTD, value_1JTV) if x is not None]
    if any(x.dim() != 4 or x.shape[0] != 1 for x in tensors):
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise ValueError(f"query, key and value are {shapes}; each must be [1, heads, tokens, head size]")
    query_THD, key_TJD, *values_TJV = (x[0].transpose(0, 1) for x in tensors)
    if value_1JTV is None and value_blocks_NPJV.data_ptr() != key_blocks_NPJD.data_ptr():
        raise ValueError("blocks of values are no part of those of keys; give a value")
    kv = PagedKV(key_blocks_NPJD, value_blocks_NPJV, key_scales_NPJG, value_scales_NPJG)
    kv.store(key_TJD, values_TJV[0] if values_TJV else None, slot_mapping)
    rule = {"sinks": sinks, "window": window, "scale": scale, "softcap": softcap}
    return kv.attention(query_THD, block_table, lengths, query_starts, **rule)[None]


@torch.library.register_fake("kt::cached_attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(key_blocks: Tensor, value_blocks: Tensor, *others: Tensor) -> Tensor:
    query = others[2]
    return query.new_empty(1, query.shape[2], query.shape[1], value_blocks.shape[3])
