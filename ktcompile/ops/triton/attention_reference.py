"""Attention over blocks, and what fills them, in plain torch: what is right, without regard to speed.

Shape suffixes: T tokens, L keys of a request, Q heads of queries, J heads of keys, D head size, V size of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_TQD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of the queries [starts[r], starts[r + 1]) of each request r, [T, Q, V] in fp64.

    They are the last tokens of the request, which has lengths[r] tokens. A query sees itself and what is before it,
    `window` tokens in all if one is given. sinks: [Q], a logit for each head that takes weight and has no value.
    """
    out = q_TQD.new_zeros(*q_TQD.shape[:2], v_cache.shape[-1], dtype=torch.float64)
    for r, length in enumerate(lengths.tolist()):
        begin, end = starts[r : r + 2].tolist()
        k_LJD, v_LJV = (tokens_of(cache, block_table[r], length).double() for cache in (k_cache, v_cache))
        group = q_TQD.shape[1] // k_LJD.shape[1]
        for t in range(begin, end):
            last = length - end + t
            first = 0 if window is None else max(0, last + 1 - window)
            k_QLD, v_QLV = (x[first : last + 1].transpose(0, 1).repeat_interleave(group, 0) for x in (k_LJD, v_LJV))
            logits_QL = (k_QLD @ q_TQD[t].double().unsqueeze(2)).squeeze(2) * scale
            if sinks is not None:
                logits_QL = torch.cat([logits_QL, sinks.double().unsqueeze(1)], 1)
            weights_QL = logits_QL.softmax(1)[:, : last + 1 - first]
            out[t] = (weights_QL.unsqueeze(1) @ v_QLV).squeeze(1)
    return out


def tokens_of(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the first `length` tokens, [L, J, D], of a request whose blocks these are. cache: [blocks, size, J, D]."""
    block_size = cache.shape[1]
    positions = torch.arange(length, device=cache.device)
    return cache[blocks[positions // block_size].long(), positions % block_size]


def rotate(x_TJD: Tensor, cos_TF: Tensor, sin_TF: Tensor, begin: int, interleaved: bool) -> Tensor:
    """Return x in fp32 with the dimensions [begin, begin + 2F) rotated.

    Pairs are dimensions i and i + F of these, or neighbours if interleaved. See "RoFormer", arXiv:2104.09864.
    """
    count = cos_TF.shape[1]
    out = x_TJD.float().clone()
    part = out[..., begin : begin + 2 * count]
    pairs = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :count], part[..., count:])
    cos, sin = cos_TF.float().unsqueeze(1), sin_TF.float().unsqueeze(1)
    first, second = pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin
    pairs[0].copy_(first)
    pairs[1].copy_(second)
    return out
