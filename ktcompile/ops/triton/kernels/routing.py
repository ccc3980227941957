"""Pairs of a token and one of its slots sorted by expert: a counting sort that keeps the order of pairs.

A program has a chunk of pairs, and takes ROWS of them at a time. Where there are several chunks, it knows the others by
their counts of each expert; a single one counts by itself. An expert that is not resident is -1 here. Numbers that vary
with the batch are not specialised, so that few kernels are compiled for a model.

Shape suffixes: R rows (of pairs, chunks or blocks), E experts.
"""

import triton
import triton.language as tl


@triton.jit
def _load_pairs(ids_ptr, place_ptr, pair_R, num_pairs, num_experts, num_resident):
    """Return the expert of each pair and its place, or -1 for both."""
    id_R = tl.load(ids_ptr + pair_R, mask=pair_R < num_pairs, other=-1)
    exists_R = (id_R >= 0) & (id_R < num_experts)
    place_R = tl.load(place_ptr + id_R, mask=exists_R, other=-1)
    is_resident_R = (place_R >= 0) & (place_R < num_resident)
    return tl.where(is_resident_R, id_R, -1).to(tl.int32), tl.where(is_resident_R, place_R, -1)


@triton.jit
def _count(
    ids_ptr, place_ptr, first, num_pairs, num_experts, num_resident,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Return how many pairs of the chunk that begins with `first` each expert has."""
    count_E = tl.zeros([EXPERTS], tl.int32)
    for begin in range(first, tl.minimum(first + CHUNK, num_pairs), ROWS):
        pair_R = begin + tl.arange(0, ROWS)
        expert_R, _ = _load_pairs(ids_ptr, place_ptr, pair_R, num_pairs, num_experts, num_resident)
        count_E += tl.sum((expert_R[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32), 0)
    return count_E


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    ids_ptr, place_ptr, counts_ptr, num_pairs, num_experts, num_resident,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write how many pairs of a chunk each expert has, [chunks, EXPERTS]."""
    chunk = tl.program_id(0)
    count_E = _count(ids_ptr, place_ptr, chunk * CHUNK, num_pairs, num_experts, num_resident, CHUNK, ROWS, EXPERTS)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), count_E)


@triton.jit
def _store_blocks(
    blocks_ptr, place_ptr, start_E, count_E, num_experts, num_blocks,
    BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write this program's share of the blocks: place, begin, end. The rows of expert e are [start, start + count)."""
    expert_E = tl.arange(0, EXPERTS)
    place_E = tl.load(place_ptr + expert_E, mask=expert_E < num_experts, other=-1)
    blocks_E = (count_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    last_E = tl.cumsum(blocks_E, 0)
    first_E = last_E - blocks_E
    for begin in range(tl.program_id(0) * ROWS, num_blocks, tl.num_programs(0) * ROWS):
        block_R = begin + tl.arange(0, ROWS)
        # At most one expert has a block.
        has_RE = (block_R[:, None] >= first_E[None, :]) & (block_R[:, None] < last_E[None, :])
        begin_RE = start_E[None, :] + (block_R[:, None] - first_E[None, :]) * BLOCK_ROWS
        end_RE = tl.minimum(begin_RE + BLOCK_ROWS, (start_E + count_E)[None, :])
        at, mask = blocks_ptr + 3 * block_R, block_R < num_blocks
        tl.store(at, tl.sum(tl.where(has_RE, place_E[None, :] + 1, 0), 1) - 1, mask=mask)
        tl.store(at + 1, tl.sum(tl.where(has_RE, begin_RE, 0), 1), mask=mask)
        tl.store(at + 2, tl.sum(tl.where(has_RE, end_RE, 0), 1), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def route_kernel(
    ids_ptr, place_ptr, counts_ptr, order_ptr, resident_ptr, blocks_ptr,
    num_pairs, num_experts, num_resident, num_blocks,
    COUNTED: tl.constexpr, KEEP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write where the pairs of a chunk are in the order, and their places, and a share of the blocks.

    COUNTED: there are counts of every chunk. KEEP: pairs without a resident expert keep the place that is there.
    """
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    expert_E = tl.arange(0, EXPERTS)
    before_E = tl.zeros([EXPERTS], tl.int32)
    if COUNTED:
        count_E = tl.zeros([EXPERTS], tl.int32)
        for begin in range(0, tl.num_programs(0), ROWS):
            chunk_R = begin + tl.arange(0, ROWS)
            at = counts_ptr + chunk_R[:, None] * EXPERTS + expert_E[None, :]
            count_RE = tl.load(at, mask=(chunk_R < tl.num_programs(0))[:, None], other=0)
            count_E += tl.sum(count_RE, 0)
            before_E += tl.sum(tl.where((chunk_R < chunk)[:, None], count_RE, 0), 0)
    else:
        count_E = _count(ids_ptr, place_ptr, first, num_pairs, num_experts, num_resident, CHUNK, ROWS, EXPERTS)
    start_E = tl.cumsum(count_E, 0) - count_E
    _store_blocks(blocks_ptr, place_ptr, start_E, count_E, num_experts, num_blocks, BLOCK_ROWS, ROWS, EXPERTS)

    # Where the next pair of each expert goes, and the next without one.
    next_E = start_E + before_E
    next_other = tl.sum(count_E, 0) + first - tl.sum(before_E, 0)
    for begin in range(first, tl.minimum(first + CHUNK, num_pairs), ROWS):
        pair_R = begin + tl.arange(0, ROWS)
        expert_R, place_R = _load_pairs(ids_ptr, place_ptr, pair_R, num_pairs, num_experts, num_resident)
        is_RE = expert_R[:, None] == expert_E[None, :]
        rank_RE = tl.cumsum(is_RE.to(tl.int32), 0) - 1
        other_R = (expert_R < 0).to(tl.int32)
        at_R = tl.where(
            expert_R < 0,
            next_other + tl.cumsum(other_R, 0) - 1,
            tl.sum(tl.where(is_RE, next_E[None, :] + rank_RE, 0), 1),
        )
        mask_R = pair_R < num_pairs
        tl.store(order_ptr + at_R, pair_R, mask=mask_R)
        tl.store(resident_ptr + pair_R, place_R, mask=mask_R & (place_R >= 0) if KEEP else mask_R)
        next_E += tl.sum(is_RE.to(tl.int32), 0)
        next_other += tl.sum(other_R, 0)
