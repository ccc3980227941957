"""Blocks in host memory: slots of one arena under a budget of bytes."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ktcompile.cache.block_id import BlockId
from ktcompile.cache.counters import Counters
from ktcompile.cache.policy import Policy
from ktcompile.cache.record import checksum
from ktcompile.cache.tree import Tree


def arena(size: int) -> memoryview:
    """Return memory of `size` bytes, which the system gives as it is written to for the first time."""
    if size == 0:
        return memoryview(b"")
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


@dataclass(slots=True, eq=False)
class _Slot:
    """A block and where it lies. whole: it can be found; before it is being written. sum: of its bytes. uses: hits.
    gone: it was given up while somebody read or wrote it, who frees the slot. users: how many do."""

    block: BlockId
    number: int
    whole: bool = False
    sum: bytes = b""
    uses: int = 0
    users: int = 0
    gone: bool = False

    @property
    def key(self) -> bytes:
        return self.block.key

    @property
    def parent(self) -> bytes:
        return self.block.parent

    @property
    def position(self) -> int:
        return self.block.position


class Reserved:
    """A slot that is being written. memory: its bytes, until `HostStore.publish` or `abandon`."""

    def __init__(self, slot: _Slot, memory: memoryview) -> None:
        self._slot, self.memory = slot, memory


class HostStore:
    """Blocks of `block_bytes` in the slots of `arena`, chosen by `policy`, whose capacity is no larger. One without
    a slot takes no block.

    A block is there from `publish` on, and only behind its parent. verify: whether the checksum of a block is compared
    each time that it is read; the token ids always are. Any thread may call; no method waits for another's copy.
    """

    def __init__(
        self,
        arena: memoryview,
        block_bytes: int,
        policy: Policy[bytes],
        clock: Callable[[], float],
        counters: Counters,
        verify: bool = True,
    ) -> None:
        self.block_bytes, self.capacity = block_bytes, len(arena) // block_bytes
        if self.capacity and policy.limits.capacity > self.capacity * block_bytes:
            raise ValueError(f"{policy.limits.capacity} bytes are more than {self.capacity} slots of {block_bytes} are")
        self._arena, self._policy, self._clock, self._counters, self._verify = arena, policy, clock, counters, verify
        self._lock = threading.Lock()
        self._tree: Tree[_Slot] = Tree()
        self._free = list(range(self.capacity))

    def __len__(self) -> int:
        return len(self._tree)

    def has(self, key: bytes) -> bool:
        """Return whether a block is here, or is being written; nobody asked for it."""
        with self._lock:
            return key in self._tree

    def find(self, block: BlockId) -> int | None:
        """Return how often a block was a hit before, None where it is not here; say that it was asked for."""
        with self._lock:
            self._policy.touch(block.key, self._clock())
            slot = self._tree.get(block.key)
            if slot is None or not slot.whole or slot.block != block:
                return None
            slot.uses += 1
            return slot.uses - 1

    def reserve(self, block: BlockId) -> Reserved | None:
        """Return memory for a block that is to be here; None: it is, its parent is not, or others stay in its place."""
        with self._lock:
            slot = _Slot(block, -1, users=1)
            if not self._tree.takes(slot):
                return None
            tenant = block.namespace.hex()
            fits, gone = self._policy.insert(
                block.key, block.parent, self.block_bytes, block.position, self._clock(), tenant
            )
            for key in gone:
                self._cut(key)
            # A slot may still be read though its block is gone, and what went may have been the parent.
            if not fits or not self._free or not self._tree.takes(slot):
                if fits:
                    self._policy.remove(block.key)
                return None
            slot.number = self._free.pop()
            self._tree.add(slot)
            self._policy.pin(block.key)
            return Reserved(slot, self._memory(slot))

    def publish(self, reserved: Reserved, sum_: bytes | None = None) -> None:
        """Have a block found whose memory was written. sum_: its xxh3_128, where it is known already."""
        slot = reserved._slot
        slot.sum = checksum(reserved.memory) if sum_ is None else sum_
        with self._lock:
            slot.whole = not slot.gone
            self._leave(slot)
        self._counters.add("host_stored")
        self._counters.add("host_bytes_in", self.block_bytes)

    def abandon(self, reserved: Reserved) -> None:
        """Give up a block that could not be written, and those behind it."""
        with self._lock:
            if not reserved._slot.gone:
                self._remove(reserved._slot.key)
            self._leave(reserved._slot)

    @contextmanager
    def reading(self, block: BlockId) -> Iterator[tuple[memoryview, bytes] | None]:
        """Give the memory of a block and its checksum, which stay for the time; None: it is not here, or damaged."""
        with self._lock:
            slot = self._tree.get(block.key)
            if slot is not None and slot.whole and slot.block == block:
                slot.users += 1
                self._policy.pin(block.key)
            else:
                slot = None
        if slot is None:
            yield None
            return
        try:
            memory = self._memory(slot)
            if self._verify and checksum(memory) != slot.sum:
                self._counters.add("host_verify_failed")
                self.remove(block.key)
                yield None
            else:
                self._counters.add("host_bytes_out", self.block_bytes)
                yield memory, slot.sum
        finally:
            with self._lock:
                self._leave(slot)

    def blocks(self) -> list[BlockId]:
        """Return the blocks that are whole, parents before children."""
        with self._lock:
            return [slot.block for slot in self._tree.nodes() if slot.whole]

    def remove(self, key: bytes) -> None:
        """Give up a block and those behind it."""
        with self._lock:
            self._remove(key)

    def pin(self, key: bytes) -> bool:
        """Keep a block until it is unpinned. False: it is not here."""
        with self._lock:
            return self._policy.pin(key)

    def unpin(self, key: bytes) -> None:
        """Take one pin back."""
        with self._lock:
            self._policy.unpin(key)

    def expire(self) -> None:
        """Give up blocks that nobody used for the policy's time to live."""
        with self._lock:
            for key in self._policy.expire(self._clock()):
                self._cut(key)

    def check(self) -> None:
        """Assert that slots are free or have one block, and that each block is behind its parent."""
        with self._lock:
            slots = self._tree.nodes()
            numbers = [slot.number for slot in slots]
            assert len({*numbers, *self._free}) == len(numbers) + len(self._free) <= self.capacity
            assert len(self._policy) == len(slots), "the policy knows other blocks"
            for slot in slots:
                assert slot.key in self._policy
                assert slot.position == 0 or slot.parent in self._tree
                assert not slot.gone

    def _memory(self, slot: _Slot) -> memoryview:
        begin = slot.number * self.block_bytes
        return self._arena[begin : begin + self.block_bytes]

    def _remove(self, key: bytes) -> None:
        for slot in self._cut(key, evicted=False):
            self._policy.remove(slot.key)

    def _cut(self, key: bytes, evicted: bool = True) -> list[_Slot]:
        slots = self._tree.cut(key)
        for slot in slots:
            slot.gone = True
            if slot.key != key and evicted:  # the policy has forgotten the first
                self._policy.remove(slot.key)
            if not slot.users:
                self._free.append(slot.number)
            if evicted:
                self._counters.add("host_evicted")
        return slots

    def _leave(self, slot: _Slot) -> None:
        """One user less; the slot of a block that is gone is free after the last."""
        slot.users -= 1
        if not slot.gone:
            self._policy.unpin(slot.key)
        elif not slot.users:
            self._free.append(slot.number)
