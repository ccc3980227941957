"""Rotary embedding of queries and keys, and the keys' and values' way into their slots.

Shape suffixes: B heads of a tile, D head size, V size of values.
"""

import triton
import triton.language as tl


@triton.jit
def rotated(ptrs, mask, d, cos_ptr, sin_ptr, begin, COUNT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return heads [B, D] in fp32, with the dimensions [begin, begin + 2 * COUNT) rotated."""
    i = d - begin
    inside = (i >= 0) & (i < 2 * COUNT)
    if INTERLEAVED:
        pair = i // 2
        is_first = i % 2 == 0
        partner = tl.where(is_first, d + 1, d - 1)
    else:
        pair = tl.where(i < COUNT, i, i - COUNT)
        is_first = i < COUNT
        partner = tl.where(is_first, d + COUNT, d - COUNT)
    x = tl.load(ptrs[:, None] + d[None, :], mask=mask, other=0).to(tl.float32)
    y = tl.load(ptrs[:, None] + partner[None, :], mask=mask & inside[None, :], other=0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=inside, other=1).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=inside, other=0).to(tl.float32)
    return x * cos[None, :] + y * tl.where(is_first, -sin, sin)[None, :]


@triton.jit
def store_kernel(
    q_ptr, out_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    num_heads, num_kv_heads, q_tiles, head_size, value_size, begin, block_size,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kcb, stride_kcs, stride_kch, stride_vcb, stride_vcs, stride_vch,
    B: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    COUNT: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """Write B heads of a token: of the rotated queries, or of the rotated keys and the values into their slot.

    Those whose slot is negative are left out.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos_ptr += position * COUNT
    sin_ptr += position * COUNT
    d = tl.arange(0, D)
    if tile < q_tiles:
        head = tile * B + tl.arange(0, B)
        mask = (head < num_heads)[:, None] & (d < head_size)[None, :]
        x = rotated(q_ptr + token * stride_qt + head * stride_qh, mask, d, cos_ptr, sin_ptr, begin, COUNT, INTERLEAVED)
        at = out_ptr + token * stride_ot + head[:, None] * stride_oh + d[None, :]
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        if slot >= 0:
            block = slot // block_size
            in_block = slot % block_size
            head = (tile - q_tiles) * B + tl.arange(0, B)
            mask = (head < num_kv_heads)[:, None] & (d < head_size)[None, :]
            k_ptrs = k_ptr + token * stride_kt + head * stride_kh
            x = rotated(k_ptrs, mask, d, cos_ptr, sin_ptr, begin, COUNT, INTERLEAVED)
            at = k_cache_ptr + block * stride_kcb + in_block * stride_kcs + head[:, None] * stride_kch + d[None, :]
            tl.store(at, x.to(k_cache_ptr.dtype.element_ty), mask=mask)
            if HAS_VALUES:
                e = tl.arange(0, V)
                mask = (head < num_kv_heads)[:, None] & (e < value_size)[None, :]
                value = tl.load(v_ptr + token * stride_vt + head[:, None] * stride_vh + e[None, :], mask=mask, other=0)
                at = v_cache_ptr + block * stride_vcb + in_block * stride_vcs + head[:, None] * stride_vch + e[None, :]
                tl.store(at, value, mask=mask)
