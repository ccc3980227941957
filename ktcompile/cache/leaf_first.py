"""The bookkeeping that all policies share: which blocks may go at all, and what each tenant has."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Generic, Protocol

from ktcompile.cache.block import Block, Order, heads
from ktcompile.cache.policy import K, Limits


class Rule(Protocol[K]):
    """Chooses among blocks that may go.

    It sorts blocks into groups, and of each group only the one that nobody used for the longest time is looked at.
    `Block.group` is its own, and changes in `used` and `choose` alone, for the blocks of the call.
    """

    groups: int

    def used(self, block: Block[K], now: float, new: bool) -> None:
        """Take note of a use, before `block` says so. new: the block comes with it."""

    def missed(self, key: K, now: float) -> None:
        """Take note that a block was asked for that is not here."""

    def gone(self, block: Block[K], now: float | None) -> None:
        """Take note that a block was given up; now is None where it was lost."""

    def choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        """Return which of the oldest blocks of groups goes; there is one at least, and each is of another group."""

    def admits(self, block: Block[K], victim: Block[K], now: float) -> bool:
        """Return whether a block that comes is worth more than the one that would go for it."""


class LeafFirst(Generic[K]):
    """A `Policy` by a rule. A call takes O(log n) for each block that comes, goes or is used."""

    def __init__(self, limits: Limits, rule: Rule[K]) -> None:
        self.limits = limits
        self._rule = rule
        self._blocks: dict[K, Block[K]] = {}
        # Children that are here, of blocks that may be elsewhere.
        self._children: Counter[K] = Counter()
        self._used = 0
        self._bytes: Counter[str] = Counter()
        self._places = itertools.count(1)
        self._orders: list[Order[K]] = [Order() for _ in range(rule.groups)]
        # Of tenants that have a quota, since these may have to give up blocks of their own.
        self._own_orders: dict[str, list[Order[K]]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: K) -> bool:
        return key in self._blocks

    @property
    def used(self) -> int:
        """Bytes of all blocks."""
        return self._used

    def used_by(self, tenant: str) -> int:
        """Return the bytes of a tenant's blocks."""
        return self._bytes[tenant]

    def insert(
        self, key: K, parent: K | None, size: int, position: int, now: float, tenant: str = ""
    ) -> tuple[bool, list[K]]:
        """See `Policy`."""
        assert key not in self._blocks, f"block {key!r} is here already"
        assert size > 0, f"block {key!r} has {size} bytes"
        block = Block(key, parent, size, position, tenant, now)
        # What the new block continues must not go for it.
        held = parent is not None and self.pin(parent)
        fits, gone = self._make_room(block, now)
        if held and parent is not None:
            self.unpin(parent)
        if fits:
            self._rule.used(block, now, True)
            self._add(block)
        return fits, gone

    def touch(self, key: K, now: float) -> None:
        """See `Policy`."""
        block = self._blocks.get(key)
        if block is None:
            self._rule.missed(key, now)
            return
        self._rule.used(block, now, False)
        block.last = now
        block.uses += 1
        self._place(block)

    def evict(self, size: int, now: float) -> list[K]:
        """See `Policy`."""
        gone: list[K] = []
        least = self._used - size
        while self._used > least and (oldest := heads(self._orders)):
            gone.append(self._give_up(self._choose(oldest, now), now))
        return gone

    def expire(self, now: float) -> list[K]:
        """See `Policy`."""
        gone: list[K] = []
        while (block := self._expired(heads(self._orders), now)) is not None:
            gone.append(self._give_up(block, now))
        return gone

    def remove(self, key: K) -> bool:
        """See `Policy`."""
        block = self._blocks.get(key)
        if block is not None:
            self._rule.gone(block, None)
            self._drop(block)
        return block is not None

    def pin(self, key: K) -> bool:
        """See `Policy`."""
        block = self._blocks.get(key)
        if block is not None:
            block.pins += 1
            block.place = 0
        return block is not None

    def unpin(self, key: K) -> bool:
        """See `Policy`."""
        block = self._blocks.get(key)
        if block is not None:
            assert block.pins > 0, f"block {key!r} is unpinned and was not pinned"
            block.pins -= 1
            self._place(block)
        return block is not None

    def check(self) -> None:
        """Assert that sizes add up, and that those blocks may go that have no child and no pin."""
        assert self._used == sum(b.size for b in self._blocks.values()) <= self.limits.capacity
        bytes_of: Counter[str] = Counter()
        for block in self._blocks.values():
            bytes_of[block.tenant] += block.size
        assert +self._bytes == bytes_of
        assert self._children == Counter(b.parent for b in self._blocks.values() if b.parent is not None)
        for block in self._blocks.values():
            assert (block.place > 0) == (block.pins == 0 and block.key not in self._children)

    def _make_room(self, block: Block[K], now: float) -> tuple[bool, list[K]]:
        gone: list[K] = []
        capacity, quota = self.limits.capacity, self.limits.quota_of(block.tenant)
        if block.size > capacity or (quota is not None and block.size > quota):
            return False, gone
        while True:
            if quota is not None and self._bytes[block.tenant] + block.size > quota:
                oldest = heads(self._own_orders.get(block.tenant, ()))
            elif self._used + block.size > capacity:
                oldest = heads(self._orders)
            else:
                return True, gone
            victim = self._expired(oldest, now)
            if victim is None and oldest:
                victim = self._choose(oldest, now)
                if not self._rule.admits(block, victim, now):
                    return False, gone
            if victim is None:
                return False, gone
            gone.append(self._give_up(victim, now))

    def _choose(self, oldest: Sequence[Block[K]], now: float) -> Block[K]:
        groups = [block.group for block in oldest]
        victim = self._rule.choose(oldest, now)
        for block, group in zip(oldest, groups, strict=True):
            if block.group != group:
                self._place(block)
        return victim

    def _expired(self, oldest: Sequence[Block[K]], now: float) -> Block[K] | None:
        if self.limits.ttl is None or not oldest:
            return None
        first = min(oldest, key=lambda block: block.last)
        return first if first.last + self.limits.ttl <= now else None

    def _give_up(self, block: Block[K], now: float) -> K:
        self._rule.gone(block, now)
        self._drop(block)
        return block.key

    def _add(self, block: Block[K]) -> None:
        self._blocks[block.key] = block
        self._used += block.size
        self._bytes[block.tenant] += block.size
        if block.parent is not None:
            self._children[block.parent] += 1
            if block.parent in self._blocks:
                self._blocks[block.parent].place = 0
        self._place(block)

    def _drop(self, block: Block[K]) -> None:
        del self._blocks[block.key]
        block.place = 0
        self._used -= block.size
        self._bytes[block.tenant] -= block.size
        if not self._bytes[block.tenant]:
            del self._bytes[block.tenant]
            self._own_orders.pop(block.tenant, None)
        if block.parent is not None:
            self._children[block.parent] -= 1
            if not self._children[block.parent]:
                del self._children[block.parent]
                if block.parent in self._blocks:
                    self._place(self._blocks[block.parent])

    def _place(self, block: Block[K]) -> None:
        """Put a block into the orders that it belongs to, if it may go."""
        block.place = 0
        if block.pins or block.key in self._children:
            return
        block.place = next(self._places)
        self._orders[block.group].push(block)
        if self.limits.quota_of(block.tenant) is not None:
            own = self._own_orders.setdefault(block.tenant, [Order() for _ in range(self._rule.groups)])
            own[block.group].push(block)
