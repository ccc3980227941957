"""Rotary embedding, and keys and values into their slots.

Shape suffixes: T tokens, Q heads of queries, J heads of keys, D head size, V size of values, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.ops.triton.kernels.kv import store_kernel
from ktcompile.ops.triton.launch import Launch, power_of_2

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """A rotary embedding.

    cos, sin: [positions, F], floating, contiguous, by position. The dimensions [begin, begin + 2F) of a head are
    rotated; F = 0 rotates none. interleaved: pairs are neighbours, else dimensions F apart.
    """

    cos: Tensor
    sin: Tensor
    begin: int = 0
    interleaved: bool = False


def store_kv(
    q_TQD: Tensor,
    k_TJD: Tensor,
    v_TJV: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    rotary: Rotary,
) -> Tensor:
    """Return q rotated, [T, Q, D], in its dtype, and write k, rotated, and v into their slots.

    All of one dtype, and contiguous in the last dimension. Caches: [blocks, block_size, J, D or V]. v and v_cache are
    None where values are a part of the keys. positions: int32 or int64 [T], each below that of `rotary`'s tables,
    which is not checked. slot_mapping: int32 or int64 [T], block * block_size + offset, below that of the cache, which
    is not checked either; a negative one writes nothing. Products are in fp32. ValueError: shapes, dtypes or devices
    do not fit.
    """
    _check(q_TQD, k_TJD, k_cache, rotary)
    _check_values(k_TJD, v_TJV, k_cache, v_cache)
    for tensor, what in ((positions, "positions"), (slot_mapping, "slot_mapping")):
        if tensor.shape != q_TQD.shape[:1] or tensor.dtype not in (torch.int32, torch.int64):
            wanted = f"[{q_TQD.shape[0]}] of int32 or int64"
            raise ValueError(f"{what} is {list(tensor.shape)} of {tensor.dtype}; it must be {wanted}")
    tensors = (q_TQD, k_TJD, v_TJV, positions, slot_mapping, k_cache, v_cache, rotary.cos, rotary.sin)
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(map(str, devices)))}; all must be on one device")
    out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
    arguments = (q_TQD, k_TJD, v_TJV, positions.contiguous(), slot_mapping.contiguous(), k_cache, v_cache, rotary)
    store_launch(*arguments, out_TQD).run()
    return out_TQD


def store_launch(
    q_TQD: Tensor,
    k_TJD: Tensor,
    v_TJV: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    rotary: Rotary,
    out_TQD: Tensor,
) -> Launch:
    """Return the kernel of a call. Arguments as `store_kv` has checked them."""
    (tokens, heads, size), kv_heads = q_TQD.shape, k_TJD.shape[1]
    v, held = (k_TJD, k_cache) if v_TJV is None or v_cache is None else (v_TJV, v_cache)
    columns = power_of_2(size)
    rows = max(1, 1024 // columns)
    q_tiles, kv_tiles = -(-heads // rows), -(-kv_heads // rows)
    return Launch(
        store_kernel,
        (tokens, q_tiles + kv_tiles),
        (
            *(q_TQD, out_TQD, k_TJD, v, k_cache, held, rotary.cos, rotary.sin, positions, slot_mapping),
            *(heads, kv_heads, q_tiles, size, v.shape[2], rotary.begin, k_cache.shape[1]),
            *(*q_TQD.stride()[:2], *out_TQD.stride()[:2], *k_TJD.stride()[:2], *v.stride()[:2]),
            *(*k_cache.stride()[:3], *held.stride()[:3]),
        ),
        {
            "B": rows,
            "D": columns,
            "V": power_of_2(v.shape[2]),
            "COUNT": rotary.cos.shape[1],
            "INTERLEAVED": rotary.interleaved,
            "HAS_VALUES": v_TJV is not None,
        },
    )


def _check(q: Tensor, k: Tensor, k_cache: Tensor, rotary: Rotary) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2]:
        wanted = "[tokens, heads, size] of the same tokens and size"
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; they must be {wanted}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or k_cache.dtype != q.dtype:
        allowed = ", ".join(str(d) for d in _DTYPES)
        raise ValueError(
            f"q is {q.dtype}, k is {k.dtype}, the cache is {k_cache.dtype}; they must be the same of {allowed}"
        )
    if k_cache.dim() != 4 or k_cache.shape[2:] != k.shape[1:]:
        raise ValueError(
            f"k_cache is {list(k_cache.shape)}; it must be [blocks, block_size, {k.shape[1]}, {k.shape[2]}]"
        )
    if not q.stride(2) == k.stride(2) == k_cache.stride(3) == 1:
        raise ValueError("q, k and k_cache must be contiguous in the last dimension")
    cos, sin = rotary.cos, rotary.sin
    if cos.dim() != 2 or cos.shape != sin.shape or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(
            f"cos is {list(cos.shape)} and sin is {list(sin.shape)}; they must be [positions, F], contiguous"
        )
    if rotary.begin < 0 or rotary.begin + 2 * cos.shape[1] > q.shape[2]:
        last = rotary.begin + 2 * cos.shape[1]
        raise ValueError(f"dimensions {rotary.begin} to {last} are to be rotated, but a head has {q.shape[2]}")


def _check_values(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None) -> None:
    if v is None and v_cache is None:
        return
    if v is None or v_cache is None:
        raise ValueError("v and v_cache must both be given, or both be None")
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.dtype != k.dtype or v.stride(2) != 1:
        wanted = f"[{k.shape[0]}, {k.shape[1]}, size] of {k.dtype}, contiguous in the last dimension"
        raise ValueError(f"v is {list(v.shape)} of {v.dtype}; it must be {wanted}")
    shape = [*k_cache.shape[:3], v.shape[2]]
    if list(v_cache.shape) != shape or v_cache.dtype != v.dtype or v_cache.stride(3) != 1:
        raise ValueError(f"v_cache is {list(v_cache.shape)} of {v_cache.dtype}; it must be {shape} of {v.dtype}")
