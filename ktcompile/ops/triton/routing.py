"""Which rows of the experts' products belong together, found on the device without waiting for it.

Shape suffixes: T tokens, K top_k, P pairs (T * K), E experts, B blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Pairs of a token and one of its slots, pair = token * top_k + k, sorted by expert; all int32.

    order: [P], the pairs; those without a resident expert come last. resident: [P], the place of each pair's expert
    among the resident ones, by pair, or -1. A block is the rows [begin, end) of `order`, at most `block_rows`, all of
    one expert, whose place is in `expert`; that is -1 for a block without rows; [B] each. There are as many blocks as
    the worst routing needs.
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
    may change without a compilation. Ids outside [0, E) and places outside [0, num_resident) are not resident. Other
    layers may have most of the places: the work depends on the number of this layer's experts, not on num_resident.
    The order is stable, hence the same for the same arguments.
    """
    num_experts, num_pairs = resident_E.shape[0], ids_TK.numel()
    place_E = torch.where((resident_E >= 0) & (resident_E < num_resident), resident_E, -1)
    place_E = torch.cat([place_E, place_E.new_full((1,), -1)])
    ids_P = ids_TK.flatten().long()
    ids_P = torch.where((ids_P >= 0) & (ids_P < num_experts), ids_P, num_experts)
    resident_P = place_E[ids_P]
    sorted_P, order_P = torch.where(resident_P >= 0, ids_P, num_experts).sort(stable=True)

    starts = torch.searchsorted(sorted_P, torch.arange(num_experts + 1, device=ids_TK.device))
    blocks_E = (starts.diff() + block_rows - 1) // block_rows
    ends_E = blocks_E.cumsum(0)
    block_B = torch.arange(max_blocks(num_pairs, num_experts, block_rows), device=ids_TK.device)
    expert_B = torch.searchsorted(ends_E, block_B, right=True)
    used_B = expert_B < num_experts
    at_B = expert_B.clamp(max=max(num_experts - 1, 0))
    begin_B = starts[at_B] + (block_B - (ends_E - blocks_E)[at_B]) * block_rows
    end_B = torch.minimum(begin_B + block_rows, starts[at_B + 1])
    return Routing(
        order=order_P.int(),
        resident=resident_P.int(),
        expert=place_E[expert_B].int(),
        begin=torch.where(used_B, begin_B, 0).int(),
        end=torch.where(used_B, end_B, 0).int(),
        top_k=ids_TK.shape[1],
    )


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Return how many blocks `num_pairs` may need: each expert's last one may have a single row."""
    if not num_experts:
        return 0
    return min(num_pairs, -(-(num_pairs + num_experts * (block_rows - 1)) // block_rows))
