"""Which rows of the experts' products belong together, found on the device without waiting for it.

Shape suffixes: T tokens, K top_k, P pairs (T * K), E experts, B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.ops.triton.kernels.routing import count_kernel, route_kernel
from ktcompile.ops.triton.launch import Launch, power_of_2

# Pairs of a program: it takes a few at a time, one after the other. One program is one launch, as for decode.
CHUNK = 128
# From so many pairs on chunks have four times as many, since each program reads the counts of all.
MANY_PAIRS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Pairs of a token and one of its slots, pair = token * top_k + k, sorted by expert; all int32.

    order: [P], the pairs; those without a resident expert come last. resident: [P], the place of each pair's expert
    among the resident ones, by pair, or -1. blocks: [B, 3], the place of an expert, begin and end: a block is the rows
    [begin, end) of `order`, at most `block_rows`, all of that expert. One without rows has -1, 0, 0. There are as many
    blocks as the worst routing needs.
    """

    order: Tensor
    resident: Tensor
    blocks: Tensor
    top_k: int


def route(
    ids_TK: Tensor, resident_E: Tensor, num_resident: int, block_rows: int, before: Routing | None = None
) -> Routing:
    """Return the blocks of rows for `ids_TK`, int32 or int64.

    resident_E: int32, the place of each expert among those on the device, or -1. It is data, so that what is resident
    may change without a compilation. Ids outside [0, E) and places outside [0, num_resident) are not resident. Other
    layers may have most of the places: the work depends on the number of this layer's experts, not on num_resident.
    The order is stable, hence the same for the same arguments. before: a routing of the same ids to other experts,
    whose `resident` becomes that of both.
    """
    num_pairs, device = ids_TK.numel(), ids_TK.device
    num_blocks = max_blocks(num_pairs, resident_E.shape[0], block_rows)
    routing = Routing(
        order=torch.empty(num_pairs, dtype=torch.int32, device=device),
        resident=torch.empty(num_pairs, dtype=torch.int32, device=device) if before is None else before.resident,
        blocks=torch.empty(num_blocks, 3, dtype=torch.int32, device=device),
        top_k=ids_TK.shape[1],
    )
    arguments = (ids_TK.contiguous(), resident_E.contiguous(), num_resident, block_rows, routing)
    for launch in route_launches(*arguments, keep=before is not None):
        launch.run()
    return routing


def route_launches(
    ids_TK: Tensor, resident_E: Tensor, num_resident: int, block_rows: int, routing: Routing, *, keep: bool
) -> Iterator[Launch]:
    """Yield the kernels that fill `routing`, to be run in order. keep: see `route_kernel`."""
    num_pairs, num_experts = ids_TK.numel(), resident_E.shape[0]
    chunk = CHUNK if num_pairs < MANY_PAIRS else 4 * CHUNK
    chunks, experts = -(-num_pairs // chunk), power_of_2(max(16, num_experts))
    sizes = (num_pairs, num_experts, num_resident)
    constants = {"CHUNK": chunk, "ROWS": max(8, min(128, 4096 // experts)), "EXPERTS": experts}
    counts = routing.order  # not read where there is one chunk
    if chunks > 1:
        counts = torch.empty(chunks, experts, dtype=torch.int32, device=ids_TK.device)
        yield Launch(count_kernel, (chunks,), (ids_TK, resident_E, counts, *sizes), constants, num_warps=8)
    yield Launch(
        route_kernel,
        (chunks,),
        (
            *(ids_TK, resident_E, counts, routing.order, routing.resident, routing.blocks),
            *(*sizes, len(routing.blocks)),
        ),
        {"COUNTED": chunks > 1, "KEEP": keep, "BLOCK_ROWS": block_rows} | constants,
        num_warps=8,
    )


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Return how many blocks `num_pairs` may need: each expert's last one may have a single row."""
    if not num_experts:
        return 0
    return min(num_pairs, -(-(num_pairs + num_experts * (block_rows - 1)) // block_rows))
