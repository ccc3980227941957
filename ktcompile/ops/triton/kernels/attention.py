"""Attention over keys and values in blocks, softmax in fp32 and base 2.

A head is taken as two parts, D1 (a power of two) and D2 (what is left, perhaps 0): latent heads are 512 + 64. Keys are
taken in tiles that begin at multiples of their size whatever the window and the chunk, and a tile in which a query sees
nothing leaves its sums as they are: the order in which the sums of a query are made depends on its position alone.

Shape suffixes: M queries of a tile, N keys of a tile, D head size, V size of values.
"""

import triton
import triton.language as tl

from ktcompile.ops.triton.kernels.weights import dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(ptrs, mask_M, head_size, D1: tl.constexpr, D2: tl.constexpr):
    """Return both parts of the queries, zero past the head's end. If D2 is 0, the second is the first."""
    d = tl.arange(0, D1)
    first = tl.load(ptrs[:, None] + d[None, :], mask=mask_M[:, None] & (d < head_size)[None, :], other=0)
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        second = tl.load(ptrs[:, None] + d[None, :], mask=mask_M[:, None] & (d < head_size)[None, :], other=0)
    else:
        second = first
    return first, second


@triton.jit
def load_rows(ptrs, d, mask, size, WHOLE: tl.constexpr):
    """Return rows of `size` elements at the sum of both, zero past their ends and where `mask` is false. WHOLE: there
    is nothing to leave out."""
    if WHOLE:
        return tl.load(ptrs + d)
    return tl.load(ptrs + d, mask=mask & (d < size), other=0)


@triton.jit
def attend(
    q1, q2, best, total, acc, k_ptr, v_ptr, table_ptr, first, begin_M, end_M, end, head_size, value_size, scale,
    block_size, stride_kb, stride_ks, stride_vb, stride_vs,
    N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, SHARED: tl.constexpr, ONE_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, ALL_SEEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return (best, total, acc) with the keys [first, first + N) taken in.

    best: the largest logit, total: the sum of weights relative to it, acc: the weighted sum of values. Query m sees the
    keys [begin_M, end_M); no key from `end` on is read. SHARED: values are the first part of the keys. ONE_BLOCK: the
    keys of a tile are in one block. WHOLE: D1, D2 and V are the sizes themselves. ALL_SEEN: each query sees all of
    these keys, which gives it the same bits: products with the scale are rounded once, with what is subtracted.
    """
    if ONE_BLOCK:
        block = tl.load(table_ptr + first // block_size).to(tl.int64)
        place = first % block_size + tl.arange(0, N)
        k_ptrs = k_ptr + block * stride_kb + place * stride_ks
        v_ptrs = v_ptr + block * stride_vb + place * stride_vs
        mask_N = first + tl.arange(0, N) < end
    else:
        position = first + tl.arange(0, N)
        mask_N = position < end
        blocks = tl.load(table_ptr + position // block_size, mask=mask_N, other=0).to(tl.int64)
        k_ptrs = k_ptr + blocks * stride_kb + (position % block_size) * stride_ks
        v_ptrs = v_ptr + blocks * stride_vb + (position % block_size) * stride_vs
    k1 = load_rows(k_ptrs[None, :], tl.arange(0, D1)[:, None], mask_N[None, :], head_size, WHOLE and ALL_SEEN)
    logits = dot(q1, k1, tl.zeros([q1.shape[0], N], tl.float32), INTERPRET)
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        k2 = load_rows(k_ptrs[None, :], d[:, None], mask_N[None, :], head_size, WHOLE and ALL_SEEN)
        logits = dot(q2, k2, logits, INTERPRET)
    if not ALL_SEEN:
        position = first + tl.arange(0, N)
        seen = (position[None, :] >= begin_M[:, None]) & (position[None, :] < end_M[:, None])
        logits = tl.where(seen, logits, -float("inf"))

    new_best = tl.maximum(best, tl.max(logits, 1) * scale)
    # Where nothing has been seen yet, -inf less -inf would be NaN.
    reference = tl.where(new_best == -float("inf"), 0.0, new_best)
    weights = tl.exp2(tl.fma(logits, scale, -reference[:, None]))
    rescale = tl.exp2(best - reference)
    total = total * rescale + tl.sum(weights, 1)
    if SHARED:
        values = tl.trans(k1)
    else:
        d = tl.arange(0, V)
        values = load_rows(v_ptrs[:, None], d[None, :], mask_N[:, None], value_size, WHOLE and ALL_SEEN)
    acc = dot(weights.to(values.dtype), values, acc * rescale[:, None], INTERPRET)
    return new_best, total, acc


@triton.jit
def decode_kernel(
    q_ptr, acc_ptr, best_ptr, total_ptr, k_ptr, v_ptr, table_ptr, length_ptr, scale, window,
    group, head_tiles, num_splits, head_size, value_size, block_size, stride_qr, stride_qh, stride_table,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr,
    SHARED: tl.constexpr, ONE_BLOCK: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write acc, best and total of one split of the keys of a request, [SPLIT * s, SPLIT * (s + 1)), for M of the heads
    that share keys. A split of which the request sees nothing is left out: `combine_kernel` does not read it."""
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // head_tiles
    split = tl.program_id(2)
    length = tl.load(length_ptr + request)
    seen_from = tl.maximum(length - window, 0)
    begin = tl.maximum(split * SPLIT, seen_from // N * N)
    end = tl.minimum((split + 1) * SPLIT, length)
    if begin >= end:
        return

    in_group = tl.program_id(1) % head_tiles * M + tl.arange(0, M)
    mask_M = in_group < group
    head = kv_head * group + in_group
    q1, q2 = load_queries(q_ptr + request * stride_qr + head * stride_qh, mask_M, head_size, D1, D2)
    best = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V], tl.float32)
    from_M = tl.zeros([M], tl.int32) + seen_from
    for first in range(begin, end, N):
        best, total, acc = attend(
            q1, q2, best, total, acc, k_ptr + kv_head * stride_kh, v_ptr + kv_head * stride_vh,
            table_ptr + request * stride_table, first, from_M, from_M - seen_from + length, end, head_size, value_size,
            scale * LOG2E, block_size, stride_kb, stride_ks, stride_vb, stride_vs, N, D1, D2, V, SHARED, ONE_BLOCK,
            WHOLE, False, INTERPRET,
        )  # fmt: skip
    num_heads = tl.num_programs(1) // head_tiles * group
    at = (request * num_heads + head) * num_splits + split
    tl.store(best_ptr + at, best, mask=mask_M)
    tl.store(total_ptr + at, total, mask=mask_M)
    d = tl.arange(0, V)
    tl.store(acc_ptr + at[:, None] * value_size + d[None, :], acc, mask=mask_M[:, None] & (d < value_size)[None, :])


@triton.jit
def combine_kernel(
    acc_ptr, best_ptr, total_ptr, out_ptr, sinks_ptr, length_ptr, window, num_splits, value_size, stride_or, stride_oh,
    SPLIT: tl.constexpr, N: tl.constexpr, V: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Write the output of a head of a request: its splits in ascending order, after the sink."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(length_ptr + request)
    if HAS_SINKS:
        best = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = 1.0
    else:
        best = -float("inf")
        total = 0.0
    d = tl.arange(0, V)
    acc = tl.zeros([V], tl.float32)
    for split in range(tl.maximum(length - window, 0) // N * N // SPLIT, tl.cdiv(length, SPLIT)):
        at = (request * tl.num_programs(1) + head) * num_splits + split
        split_best = tl.load(best_ptr + at)
        new_best = tl.maximum(best, split_best)
        before = tl.exp2(best - new_best)
        now = tl.exp2(split_best - new_best)
        total = total * before + tl.load(total_ptr + at) * now
        acc = acc * before + tl.load(acc_ptr + at * value_size + d, mask=d < value_size, other=0) * now
        best = new_best
    # A request of length 0, which is padding of the batch, gives zeros.
    value = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    at = out_ptr + request * stride_or + head * stride_oh + d
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=d < value_size)


@triton.jit
def prefill_kernel(
    q_ptr, out_ptr, k_ptr, v_ptr, sinks_ptr, table_ptr, start_ptr, length_ptr, scale, window,
    group, head_size, value_size, block_size, stride_qt, stride_qh, stride_ot, stride_oh, stride_table,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    M: tl.constexpr, N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr,
    SHARED: tl.constexpr, ONE_BLOCK: tl.constexpr, WHOLE: tl.constexpr, HAS_SINKS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write the output of M queries of a request, for one head. Queries are the last tokens of their request."""
    request = tl.program_id(2)
    start = tl.load(start_ptr + request)
    num_queries = tl.load(start_ptr + request + 1) - start
    m = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= num_queries:
        return
    mask_M = m < num_queries
    head = tl.program_id(1)
    length = tl.load(length_ptr + request)
    position = length - num_queries + m
    token = (start + m).to(tl.int64)

    q1, q2 = load_queries(q_ptr + token * stride_qt + head * stride_qh, mask_M, head_size, D1, D2)
    best = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V], tl.float32)
    first_position = length - num_queries + tl.program_id(0) * M
    end = tl.minimum(first_position + M, length)
    # The keys that some query of the tile sees, and of these the tiles of keys that all of them see.
    begin = tl.maximum(first_position + 1 - window, 0) // N * N
    all_end = tl.maximum((first_position + 1) // N * N, begin)
    all_begin = tl.minimum((tl.maximum(first_position + M - window, 0) + N - 1) // N * N, all_end)
    k_head, v_head = k_ptr + head // group * stride_kh, v_ptr + head // group * stride_vh
    table = table_ptr + request.to(tl.int64) * stride_table
    for part in tl.static_range(3):
        part_begin = begin if part == 0 else all_begin if part == 1 else all_end
        part_end = all_begin if part == 0 else all_end if part == 1 else end
        for first in range(part_begin, part_end, N):
            best, total, acc = attend(
                q1, q2, best, total, acc, k_head, v_head, table, first, position + 1 - window, position + 1, end,
                head_size, value_size, scale * LOG2E, block_size, stride_kb, stride_ks, stride_vb, stride_vs,
                N, D1, D2, V, SHARED, ONE_BLOCK, WHOLE, part == 1, INTERPRET,
            )  # fmt: skip
    if HAS_SINKS:
        # Scaled, so that neither a sink far above the logits nor one far below overflows.
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        new_best = tl.maximum(best, sink)
        acc *= tl.exp2(best - new_best)[:, None]
        total = total * tl.exp2(best - new_best) + tl.exp2(sink - new_best)
    d = tl.arange(0, V)
    at = out_ptr + token[:, None] * stride_ot + head * stride_oh + d[None, :]
    value = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask_M[:, None] & (d < value_size)[None, :])
