"""The routing of pairs to blocks of rows in plain torch: what is right, without regard to speed.

Shape suffixes: T tokens, K top_k, P pairs (T * K), E experts, B blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile.ops.triton.routing import Routing, max_blocks


def route(ids_TK: Tensor, resident_E: Tensor, num_resident: int, block_rows: int) -> Routing:
    """Return what `routing.route` does."""
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
    begin_B, end_B = torch.where(used_B, begin_B, 0), torch.where(used_B, end_B, 0)
    blocks_B3 = torch.stack([place_E[expert_B], begin_B, end_B], dim=1)
    return Routing(order_P.int(), resident_P.int(), blocks_B3.int(), ids_TK.shape[1])
