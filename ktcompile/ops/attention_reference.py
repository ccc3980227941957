"""Softmax attention in plain torch: what is right, without regard to speed.

Shape suffixes: B sequences, H heads of queries, J heads of keys, Q queries, S positions, D size of a key, V size of a
value, T queries of all sequences, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query_BHQD: Tensor,
    key_BJSD: Tensor,
    value_BJSV: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    first_position: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the attention of `ktcompile.ops.attention`, [B, H, Q, V] in fp64. Arguments as there."""
    group = query_BHQD.shape[1] // key_BJSD.shape[1]
    key_BHSD, value_BHSV = (x.double().repeat_interleave(group, 1) for x in (key_BJSD, value_BJSV))
    scores_BHQS = query_BHQD.double() @ key_BHSD.mT * (query_BHQD.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_BHQS = softcap * torch.tanh(scores_BHQS / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores_BHQS = scores_BHQS + mask.double()
    sees = visible(query_BHQD.shape[2], key_BJSD.shape[2], len(query_BHQD), lengths, causal, first_position, window)
    if mask is not None and mask.dtype == torch.bool:
        sees = sees & mask
    scores_BHQS = scores_BHQS.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores_BHQS.shape[:3], 1)
        scores_BHQS = torch.cat([scores_BHQS, column], 3)
    weights_BHQS = scores_BHQS.softmax(3)[..., : key_BJSD.shape[2]].nan_to_num(0.0)
    return weights_BHQS @ value_BHSV


def visible(
    queries: int,
    positions: int,
    sequences: int,
    lengths: Tensor | None = None,
    causal: bool = False,
    first_position: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Return which positions each query sees, bool [B, 1, Q, S]."""
    length = torch.full((sequences,), positions) if lengths is None else lengths
    first = length - queries if first_position is None else torch.full_like(length, first_position)
    place = (first[:, None] + torch.arange(queries))[:, None, :, None]
    at = torch.arange(positions)
    sees = (at < length[:, None, None, None]).expand(sequences, 1, queries, positions)
    if causal:
        sees = sees & (at <= place)
    return sees if window is None else sees & (at > place - window)


def paged_attention(
    query_THD: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    sinks: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the attention of `ktcompile.ops.paged_attention`, [T, H, V] in fp64. Arguments as there."""
    parts = []
    for b, length in enumerate(lengths.tolist()):
        key, value = (gather(x, block_table[b], length) for x in (key_blocks, value_blocks))
        query = query_THD[int(query_starts[b]) : int(query_starts[b + 1])].transpose(0, 1)[None]
        part = attention(query, key, value, None, sinks, None, True, None, window, scale, softcap)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def quantize(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes [..., D] and fp32 scales [..., G] of rows [..., D], bit for bit those of `store_kv`."""
    grouped = _in_groups(rows.float(), groups)
    most = grouped.abs().amax(-1, keepdim=True)  # NaN where an element is
    is_zero = most < 2.0**-100
    # A number over a tensor is the number times the tensor's inverse in torch.
    factors = torch.full_like(most, 127).div_(most).masked_fill_(is_zero, 0)
    is_finite = grouped.isfinite().all(-1, keepdim=True)
    scales = (most / 127).masked_fill_(is_zero, 0).masked_fill_(~is_finite, torch.nan)
    codes = (grouped * factors).masked_fill_(~is_finite, 0).round_().to(torch.int8)
    return codes.flatten(-2), scales[..., 0]


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the fp32 rows [..., D] that codes [..., D] with scales [..., G] are."""
    return (_in_groups(codes.float(), scales.shape[-1]) * scales[..., None]).flatten(-2)


def _in_groups(rows: Tensor, groups: int) -> Tensor:
    return rows.reshape(*rows.shape[:-1], groups, rows.shape[-1] // groups)


def gather(blocks: Tensor, table: Tensor, length: int) -> Tensor:
    """Return the first `length` positions of one sequence, [1, J, S, D]. blocks: [N, P, J, D]. table: [width]."""
    used = -(-length // blocks.shape[1])
    return blocks[table[:used].long()].flatten(0, 1)[:length].transpose(0, 1)[None]
