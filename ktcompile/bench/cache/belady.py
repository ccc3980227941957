"""The most tokens that a tier could have found, had it known the future (Belady's MIN)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from ktcompile.cache.recording import Recording

_NEVER = 1 << 62


def most_hits(found: Recording, capacity: int) -> int:
    """Return how many tokens a tier of `capacity` bytes finds at most.

    What is used again last, goes first, and what would go at once does not come. Whoever asks for a block asks for
    those before it too, so these are used again no later: with the later position first among equals, a block goes
    after its children without being told to, and the bound of blocks that need not be prefixes is reached by prefixes.
    """
    room = capacity // found.block_bytes
    following = _next_uses(found)
    here: dict[Hashable, int] = {}
    # (-next use, -index, block); entries whose next use is not the block's are stale.
    order: list[tuple[int, int, Hashable]] = []
    hits = 0
    for request, uses in zip(found.requests, following, strict=True):
        for block in found.usable(request):
            if block not in here:
                break
            hits += 1
        for index, (block, use) in enumerate(zip(request.blocks, uses, strict=True)):
            if block not in here:
                if use == _NEVER or not room:
                    break
                if len(here) == room:
                    while here.get(order[0][2]) != -order[0][0]:
                        heapq.heappop(order)
                    if -order[0][0] <= use:
                        break
                    del here[heapq.heappop(order)[2]]
            here[block] = use
            heapq.heappush(order, (-use, -index, block))
    return hits * found.block_size


def _next_uses(found: Recording) -> list[list[int]]:
    """Return the number of the request that uses a block next, for each block of each request."""
    following: dict[Hashable, int] = {}
    result: list[list[int]] = []
    for number in range(len(found.requests) - 1, -1, -1):
        blocks = found.requests[number].blocks
        result.append([following.get(block, _NEVER) for block in blocks])
        following.update(dict.fromkeys(found.usable(found.requests[number]), number))
    result.reverse()
    return result
