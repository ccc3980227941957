"""Which rows of the experts' products belong together, found on the device without waiting for it.

Shape suffixes: T tokens, K top_k, P pairs (T * K), E experts, S resident experts, B blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Pairs of a token and one of its slots, pair = token * top_k + k, sorted by resident expert; all int32.

    order: [P], the pairs; those without a resident expert come last. resident: [P], the resident expert of each pair,
    by pair, or -1. A block is the rows [begin, end) of `order`, at most `block_rows`, all of one resident expert, which
    is -1 for a block without rows; [B] each. There are as many blocks as the worst routing needs.
    """

    order: Tensor
    resident: Tensor
    expert: Tensor
    begin: Tensor
    end: Tensor
    top_k: int


def route(ids_TK: Tensor, resident_E: Tensor, num_resident: int, block_rows: int) -> Routing:
    """Return the blocks of rows for `ids_TK`.

    resident_E: int32, the place of each expert among those on the device, or -1. It is data, so that what is resident
    may change without a compilation. Ids outside [0, E) and places outside [0, num_resident) are not resident.
    The order is stable, hence the same for the same arguments.
    """
    num_experts, num_pairs = resident_E.shape[0], ids_TK.numel()
    ids_P = ids_TK.flatten().long()
    known_P = (ids_P >= 0) & (ids_P < num_experts)
    padded_E = torch.cat([resident_E.long(), resident_E.new_full((1,), -1).long()])
    resident_P = padded_E[torch.where(known_P, ids_P, num_experts)]
    resident_P = torch.where((resident_P >= 0) & (resident_P < num_resident), resident_P, num_resident)
    sorted_P, order_P = resident_P.sort(stable=True)

    places = torch.arange(num_resident + 1, device=ids_TK.device)
    starts = torch.searchsorted(sorted_P, places)
    blocks_S = (starts.diff() + block_rows - 1) // block_rows
    ends_S = blocks_S.cumsum(0)
    block_B = torch.arange(max_blocks(num_pairs, num_resident, block_rows), device=ids_TK.device)
    expert_B = torch.searchsorted(ends_S, block_B, right=True)
    used_B = expert_B < num_resident
    at_B = expert_B.clamp(max=max(num_resident - 1, 0))
    begin_B = starts[at_B] + (block_B - (ends_S - blocks_S)[at_B]) * block_rows
    end_B = torch.minimum(begin_B + block_rows, starts[at_B + 1])
    return Routing(
        order=order_P.int(),
        resident=torch.where(resident_P < num_resident, resident_P, -1).int(),
        expert=torch.where(used_B, expert_B, -1).int(),
        begin=torch.where(used_B, begin_B, 0).int(),
        end=torch.where(used_B, end_B, 0).int(),
        top_k=ids_TK.shape[1],
    )


def max_blocks(num_pairs: int, num_resident: int, block_rows: int) -> int:
    """Return how many blocks `num_pairs` may need: each expert's last one may have a single row."""
    if not num_resident:
        return 0
    return min(num_pairs, -(-(num_pairs + num_resident * (block_rows - 1)) // block_rows))
