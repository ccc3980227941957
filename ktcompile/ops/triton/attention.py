"""Attention over keys and values in blocks, for one query of each request and for chunks of queries.

Shape suffixes: T tokens, R requests, Q heads of queries, J heads of keys, D head size, V size of values, S splits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktcompile.ops.triton.kernels.attention import combine_kernel, decode_kernel, prefill_kernel
from ktcompile.ops.triton.launch import Launch, power_of_2

# Keys of a split. It does not depend on the batch, and so neither does the order of sums.
SPLIT = 512
# A window that no request fills.
_EVERYTHING = 1 << 30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class BlockCache:
    """Keys and values in blocks, and which blocks are whose.

    k: [blocks, block_size, J, D], and v: [blocks, block_size, J, V], both with contiguous last dimensions; v may be the
    first V dimensions of k, as latents are. block_table: int32 [R, width]; a request's entries past its length are not
    read. lengths: int32 [R], tokens of each request with those that are asked about.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    lengths: Tensor


def decode_attention(
    q_RQD: Tensor,
    cache: BlockCache,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Return the attention of the last token of each request, [R, Q, V], in the dtype of q.

    q: of the cache's dtype; Q is a multiple of J. scale: of logits, above 0. window: tokens that a query sees, with
    itself; None is all. sinks: [Q], logits that take weight and have no value. max_length: no request is longer; None
    is what the table holds. The memory for splits and the launch grow with it. Requests of length 0 give zeros. What a
    request gets does not depend on the others. ValueError: shapes, dtypes or devices do not fit.
    """
    _check(q_RQD, cache, scale, window, sinks)
    if q_RQD.shape[0] != cache.lengths.shape[0]:
        raise ValueError(f"q has {q_RQD.shape[0]} rows; it must have one for each of {cache.lengths.shape[0]} requests")
    out_RQV = q_RQD.new_empty(*q_RQD.shape[:2], cache.v.shape[3])
    for launch in decode_launches(q_RQD, cache, out_RQV, scale, window, sinks, max_length):
        launch.run()
    return out_RQV


def prefill_attention(
    q_TQD: Tensor,
    cache: BlockCache,
    starts: Tensor,
    max_queries: int,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of the queries [starts[r], starts[r + 1]) of each request r, [T, Q, V], in the dtype of q.

    They are the last tokens of the request, and their keys are in the cache already. starts: int32 [R + 1], the first
    0 and the last T. max_queries: no request has more queries. Each sees itself and what is before it; what it gets
    does not depend on the size of the chunk. All else as for `decode_attention`.
    """
    _check(q_TQD, cache, scale, window, sinks)
    if starts.shape != (cache.lengths.shape[0] + 1,) or starts.dtype != torch.int32:
        wanted = f"[{cache.lengths.shape[0] + 1}] of int32"
        raise ValueError(f"starts is {list(starts.shape)} of {starts.dtype}; it must be {wanted}")
    if not 0 <= max_queries <= q_TQD.shape[0]:
        raise ValueError(
            f"max_queries is {max_queries}; it must be from 0 to the {q_TQD.shape[0]} tokens that there are"
        )
    out_TQV = q_TQD.new_empty(*q_TQD.shape[:2], cache.v.shape[3])
    prefill_launch(q_TQD, cache, starts, max_queries, out_TQV, scale, window, sinks).run()
    return out_TQV


def decode_launches(
    q_RQD: Tensor,
    cache: BlockCache,
    out_RQV: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    max_length: int | None,
) -> Iterator[Launch]:
    """Yield the two kernels of a call. Arguments as `decode_attention` has checked them."""
    requests, heads = q_RQD.shape[:2]
    group, value_size = heads // cache.k.shape[2], cache.v.shape[3]
    held = cache.block_table.shape[1] * cache.k.shape[1]
    num_splits = -(-(held if max_length is None else max_length) // SPLIT)
    acc_RQSV = q_RQD.new_empty(requests, heads, num_splits, value_size, dtype=torch.float32)
    best_RQS, total_RQS = (acc_RQSV.new_empty(requests, heads, num_splits) for _ in range(2))
    tiles = _Tiles.of(cache)
    rows = min(max(16, power_of_2(group)), 64 if tiles.head_size <= 128 else 16)
    head_tiles = -(-group // rows)
    seen = window or _EVERYTHING
    yield Launch(
        decode_kernel,
        (requests, cache.k.shape[2] * head_tiles, num_splits),
        (
            *(q_RQD, acc_RQSV, best_RQS, total_RQS, cache.k, cache.v, cache.block_table, cache.lengths),
            *(float(scale), seen, group, head_tiles, num_splits, q_RQD.shape[2], value_size, cache.k.shape[1]),
            *(*q_RQD.stride()[:2], cache.block_table.stride(0), *cache.k.stride()[:3], *cache.v.stride()[:3]),
        ),
        tiles.constants | {"SPLIT": SPLIT, "M": rows},
    )
    yield Launch(
        combine_kernel,
        (requests, heads),
        (
            *(acc_RQSV, best_RQS, total_RQS, out_RQV, acc_RQSV if sinks is None else sinks, cache.lengths),
            *(seen, num_splits, value_size, *out_RQV.stride()[:2]),
        ),
        {"SPLIT": SPLIT, "N": tiles.keys, "V": power_of_2(value_size), "HAS_SINKS": sinks is not None},
        num_warps=1,
    )


def prefill_launch(
    q_TQD: Tensor,
    cache: BlockCache,
    starts: Tensor,
    max_queries: int,
    out_TQV: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Launch:
    """Return the kernel of a call. Arguments as `prefill_attention` has checked them."""
    tiles, heads = _Tiles.of(cache), q_TQD.shape[1]
    rows = 64 if tiles.head_size <= 256 else 16
    return Launch(
        prefill_kernel,
        (-(-max_queries // rows), heads, cache.lengths.shape[0]),
        (
            *(q_TQD, out_TQV, cache.k, cache.v, q_TQD if sinks is None else sinks),
            *(cache.block_table, starts, cache.lengths, float(scale), window or _EVERYTHING),
            *(heads // cache.k.shape[2], q_TQD.shape[2], cache.v.shape[3], cache.k.shape[1]),
            *(*q_TQD.stride()[:2], *out_TQV.stride()[:2], cache.block_table.stride(0)),
            *(*cache.k.stride()[:3], *cache.v.stride()[:3]),
        ),
        tiles.constants | {"M": rows, "HAS_SINKS": sinks is not None},
        num_warps=4 if tiles.head_size <= (128 if _has_large_products(q_TQD.device) else 64) else 8,
        num_stages=2 if tiles.head_size <= 192 else 1,
    )


@functools.cache
def _has_large_products(device: torch.device) -> bool:
    """Return whether four warps multiply 64 rows by one instruction: Hopper's, and those of what came after it. Others
    would keep part of a tile's sums in memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a head is cut: head_size = first + second, and the keys of a tile. one_block: a tile is in one block of the
    cache. whole: nothing of `first`, `second` and `values` is past the ends of keys and values."""

    head_size: int
    first: int
    second: int
    values: int
    shared: bool
    keys: int
    one_block: bool
    whole: bool

    @staticmethod
    def of(cache: BlockCache) -> _Tiles:
        head_size, value_size = cache.k.shape[3], cache.v.shape[3]
        first = max(16, 1 << head_size.bit_length() - 1)
        second = max(16, power_of_2(head_size - first)) if head_size > first else 0
        shared = cache.v.data_ptr() == cache.k.data_ptr() and cache.v.stride() == cache.k.stride()
        keys = 64 if head_size <= 128 else 32 if head_size <= 256 else 16
        values = max(16, power_of_2(value_size))
        return _Tiles(
            head_size,
            first,
            second,
            values,
            shared=shared and value_size == first,
            keys=keys,
            one_block=cache.k.shape[1] % keys == 0,
            whole=head_size == first + second and value_size == values,
        )

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "N": self.keys,
            "D1": self.first,
            "D2": self.second,
            "V": self.values,
            "SHARED": self.shared,
            "ONE_BLOCK": self.one_block,
            "WHOLE": self.whole,
        }


def _check(q: Tensor, cache: BlockCache, scale: float, window: int | None, sinks: Tensor | None) -> None:
    k, v = cache.k, cache.v
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be above 0")
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.stride(3) != 1 or v.stride(3) != 1:
        wanted = "[blocks, block_size, heads, size] of the same blocks and heads, and contiguous in size"
        raise ValueError(f"k and v of the cache are {list(k.shape)} and {list(v.shape)}; they must be {wanted}")
    if q.dim() != 3 or q.shape[2] != k.shape[3] or q.shape[1] % k.shape[2] or q.stride(2) != 1:
        wanted = f"[tokens, a multiple of {k.shape[2]}, {k.shape[3]}], and contiguous in the last dimension"
        raise ValueError(f"q is {list(q.shape)} with strides {q.stride()}; it must be {wanted}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        allowed = ", ".join(str(d) for d in _DTYPES)
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; they must be the same of {allowed}")
    table, lengths = cache.block_table, cache.lengths
    if table.dim() != 2 or lengths.shape != table.shape[:1] or table.stride(1) != 1 or not lengths.is_contiguous():
        found = f"block_table is {list(table.shape)}, lengths is {list(lengths.shape)}"
        raise ValueError(f"{found}; they must be [requests, width] and [requests], contiguous")
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"block_table is {table.dtype}, lengths is {lengths.dtype}; both must be int32")
    if window is not None and not 0 < window < _EVERYTHING:
        raise ValueError(f"window is {window}; it must be from 1 to {_EVERYTHING - 1}, or None")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_contiguous()):
        raise ValueError(f"sinks is {list(sinks.shape)}; it must be [{q.shape[1]}], contiguous")
    tensors = [q, k, v, table, lengths] + ([] if sinks is None else [sinks])
    if len({t.device for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"the arguments are on {devices}; all must be on one device")
