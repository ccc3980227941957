"""Prefixes that were computed before, or are just now: which blocks of a pool a request need not compute."""

from __future__ import annotations

from ktcompile.cache.key import child
from ktcompile.kv.block_pool import BlockName, BlockPool
from ktcompile.scheduler.request import Request


class Prefixes:
    """Names the full blocks of requests and finds them for others.

    Only requests with a `root` take part. A prompt that runs is the leader of its blocks until they are named: a
    request that would compute the same blocks anew waits for it. That ends: the leader is older and runs, and a
    younger prompt has tokens only in steps in which all older ones end, so nobody waits for more than one step longer
    than its turn would take.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._size = block_size
        self._leaders: dict[bytes, Request] = {}  # by the key of a block that is not named yet

    def find(self, request: Request) -> list[int] | None:
        """Return the blocks that hold the beginning of a request; None: a leader has more of it soon.

        All positions whose logits are wanted are computed, so at least one is.
        """
        if request.root is None:
            return []
        blocks: list[int] = []
        for name in self._names(request, request.logits_from // self._size):
            block = self._pool.find(name)
            if block is None:
                return None if name.key in self._leaders else blocks
            blocks.append(block)
        return blocks

    def start(self, request: Request) -> None:
        """Have a request that begins lead what it will compute of its tokens."""
        if request.root is None:
            return
        request.num_named = request.num_computed_tokens // self._size
        for name in self._names(request, len(request.token_ids) // self._size)[request.num_named :]:
            self._leaders.setdefault(name.key, request)

    def note_computed(self, request: Request) -> None:
        """Name the blocks of a request that are full now."""
        full = request.num_computed_tokens // self._size
        if request.root is None or full <= request.num_named:
            return
        for i, name in enumerate(self._names(request, full)[request.num_named :], request.num_named):
            self._pool.name(request.block_table[i], name)
            self._follow(name, request)
        request.num_named = full

    def leave(self, request: Request) -> None:
        """Lead nothing any more: the request ends, or gives up its blocks."""
        for name in request.block_names[request.num_named :]:
            self._follow(name, request)
        request.num_named = 0

    @property
    def leaders(self) -> set[Request]:
        """Those for which others may wait."""
        return set(self._leaders.values())

    def check(self) -> None:
        """Assert that what is led is not there yet, and that its leader has a block for it."""
        for key, leader in self._leaders.items():
            ahead = leader.block_names[leader.num_named : len(leader.block_table)]
            assert key in {name.key for name in ahead}, f"{leader.request_id} leads what it does not compute"

    def _follow(self, name: BlockName, request: Request) -> None:
        if self._leaders.get(name.key) is request:
            del self._leaders[name.key]

    def _names(self, request: Request, count: int) -> list[BlockName]:
        """Return the names of the first `count` blocks, whose tokens are known."""
        names = request.block_names
        assert request.root is not None
        for i in range(len(names), count):
            parent = names[-1].key if names else request.root
            token_ids = tuple(request.token_ids[i * self._size : (i + 1) * self._size])
            names.append(BlockName(child(parent, token_ids), parent, token_ids))
        return names[:count]
