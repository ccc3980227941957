"""What the operators of attention ask of their arguments.

Shape suffixes: J heads of keys, S positions, D size of a row, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile import _native
from ktcompile.quant import native_dtype


def check_dense(query: Tensor, key: Tensor, value: Tensor) -> None:
    """ValueError: shapes or dtypes do not fit."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or x.shape[3] == 0:
            raise ValueError(f"{name} is {list(x.shape)}; it must be [sequences, heads, positions, head size]")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key is {list(key.shape)} and value {list(value.shape)}; all but the last must be equal")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key has {key.shape[0]} sequences; it must have {query.shape[0]}, as query")
    _check_heads(query, key, value, key.shape[1])


def check_paged(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor) -> None:
    """ValueError: shapes or dtypes do not fit."""
    if query.dim() != 3 or query.shape[2] == 0:
        raise ValueError(f"query is {list(query.shape)}; it must be [queries, heads, head size]")
    for name, x in (("key_blocks", key), ("value_blocks", value)):
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} is {list(x.shape)}; it must be [blocks, block size, heads, head size]")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key_blocks is {list(key.shape)} and value_blocks {list(value.shape)}; all but the last must be equal"
        )
    if block_table.dim() != 2 or block_table.dtype != torch.int32:
        wanted = "[sequences, blocks] of torch.int32"
        raise ValueError(f"block_table is {list(block_table.shape)} of {block_table.dtype}; it must be {wanted}")
    _check_heads(query, key, value, key.shape[2])


def _check_heads(query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> None:
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query has heads of size {query.shape[-1]} and key of {key.shape[-1]}; they must be equal")
    if kv_heads == 0 or query.shape[1] % kv_heads:
        raise ValueError(f"query has {query.shape[1]} heads; it must have a multiple of the {kv_heads} of key")
    if key.dtype != value.dtype:
        raise ValueError(f"key has dtype {key.dtype} and value {value.dtype}; they must be equal")
    native_dtype(query.dtype, "query")
    for name, x in (("query", query), ("key", key), ("value", value)):
        kv_dtype(x, name)
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}; it must be on the CPU")


def kv_dtype(x: Tensor, what: str) -> _native.DType:
    """Return the dtype for the kernels, to whom that of codes says nothing."""
    return _native.DType.f32 if x.dtype == torch.int8 else native_dtype(x.dtype, what)


def check_scales(name: str, codes: Tensor, scales: Tensor | None) -> Tensor | None:
    """Return the scales of codes, each row's together; None where keys or values are floating. ValueError: there are
    none for int8, or others than float32 [..., G], G groups of D // G elements of each row of `codes`, [..., D]."""
    if codes.dtype != torch.int8:
        if scales is not None:
            raise ValueError(f"{name} has scales and dtype {codes.dtype}; only torch.int8 has scales")
        return None
    if scales is None:
        raise ValueError(f"{name} has dtype torch.int8; it needs scales")
    if scales.device.type != "cpu" or scales.dtype != torch.float32 or scales.shape[:-1] != codes.shape[:-1]:
        wanted = f"[{', '.join(map(str, codes.shape[:-1]))}, groups] of torch.float32 on the CPU"
        found = f"{list(scales.shape)} of {scales.dtype} on {scales.device}"
        raise ValueError(f"the scales of {name} are {found}; they must be {wanted}")
    size, groups = codes.shape[-1], scales.shape[-1]
    if groups != 1 and (groups == 0 or size % (16 * groups)):
        wanted = "all of a row, or the same multiple of 16 elements"
        raise ValueError(f"{name} has rows of {size} elements and {groups} scales; a scale must be for {wanted}")
    return scales if scales.stride(-1) == 1 or groups == 1 else scales.contiguous()


def counts(name: str, x: Tensor, size: int, least: int, most: int) -> Tensor:
    """Return counts as int64. ValueError: their number is wrong, or one is."""
    if x.shape != (size,) or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {list(x.shape)} of {x.dtype}; it must be [{size}] of torch.int32 or torch.int64")
    for value in x.tolist():
        if not least <= value <= most:
            raise ValueError(f"{name} has {value}; it must be from {least} to {most}")
    return x.to(torch.int64).contiguous()


def check_queries(query_starts: Tensor, lengths: Tensor, tokens: int) -> None:
    starts = query_starts.tolist()
    if starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"query_starts is {starts}; the first must be 0 and the last {tokens}, as many as queries")
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= starts[b + 1] - starts[b] <= length:
            raise ValueError(f"sequence {b} has {starts[b + 1] - starts[b]} queries; it must have 0 to {length}")


def check_blocks(block_table: Tensor, lengths: Tensor, block_size: int, blocks: int) -> None:
    used = torch.arange(block_table.shape[1]) * block_size < lengths[:, None]
    wrong = (block_table < 0) | (block_table >= blocks)
    if (wrong & used).any():
        b, i = (wrong & used).nonzero()[0].tolist()
        raise ValueError(f"block_table[{b}, {i}] is {int(block_table[b, i])}; it must be from 0 to {blocks - 1}")
