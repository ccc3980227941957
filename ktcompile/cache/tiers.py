"""The tiers behind the device, as an engine calls them: where a prefix is, bringing it to the device, keeping it.

Nothing here waits for a file or a copy on the caller's thread. Whatever cannot be had in full and in time is a miss.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ktcompile.cache.block_id import BlockId
from ktcompile.cache.counters import Counters
from ktcompile.cache.disk import DiskStore
from ktcompile.cache.host import HostStore, Reserved
from ktcompile.cache.promotion import Promotion
from ktcompile.cache.readings import Readings
from ktcompile.cache.record import checksum
from ktcompile.cache.workers import Workers

HOST, DISK = "host", "disk"


class Memory(Protocol):
    """Blocks of the device, as of `cache.transfer.BlockMemory`."""

    layout: str

    def read(self, block: int, out: memoryview) -> None: ...
    def write(self, block: int, payload: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class TierOptions:
    """When blocks go from host to disk, and how long things may take.

    disk_after_hits: hits in the host from which a block is written to disk while the engine runs; 0: each as it comes.
    What has fewer is written by `close`. load_seconds, close_seconds: of a promotion, and of closing, at most.
    maintain_seconds: between two looks at what is too old.
    """

    disk_after_hits: int = 1
    load_seconds: float = 5.0
    close_seconds: float = 10.0
    maintain_seconds: float = 5.0


class Tiers:
    """Host memory, and a disk behind it.

    Blocks come into a tier behind their parents. loaders: run promotions. storers: one thread, so that parents are
    stored before children. clock: seconds. Methods are called by one thread, the engine's.
    """

    def __init__(
        self,
        memory: Memory,
        host: HostStore,
        disk: DiskStore | None,
        loaders: Workers,
        storers: Workers,
        clock: Callable[[], float],
        counters: Counters,
        options: TierOptions,
    ) -> None:
        self._memory, self._host, self._disk = memory, host, disk
        self._loaders, self._storers = loaders, storers
        self._clock, self._counters, self._options = clock, counters, options
        self._readings = Readings()
        self._lock = threading.Lock()
        self._spilling: set[bytes] = set()
        self._forgotten: set[bytes] = set()  # not removed yet
        self._pins: dict[bytes, float] = {}  # those of the host
        self._maintained = clock()
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """What happened so far, by the names of `counters.NAMES`."""
        return self._counters.snapshot()

    def watch(self, watch: Callable[[str, int], None]) -> None:
        """Have a function told of what happens, as of `Counters`."""
        self._counters.watch = watch

    def lookup(self, blocks: Sequence[BlockId]) -> list[str]:
        """Return the tiers of the first blocks of a sequence, up to the first that is nowhere."""
        tiers = []
        for block in blocks:
            if block.key in self._forgotten:
                break
            hits = self._host.find(block)
            on_disk = self._disk is not None and self._disk.find(block)
            if hits is not None:
                tiers.append(HOST)
                if self._disk is not None and not on_disk and hits + 1 >= self._options.disk_after_hits:
                    self._spill(block)
            elif on_disk:
                tiers.append(DISK)
            else:
                break
        self._counters.add("queries", len(blocks))
        self._counters.add("miss", len(blocks) - len(tiers))
        for tier in (HOST, DISK):
            self._counters.add(f"{tier}_hit", tiers.count(tier))
        return tiers

    def promote(self, blocks: Sequence[BlockId], targets: Sequence[int], seconds: float | None = None) -> Promotion:
        """Begin to copy blocks, which follow one another, to blocks of the device; see `Promotion.result`.

        seconds: until those that are not there are misses; None: as the options say.
        """
        limit = self._options.load_seconds if seconds is None else seconds
        promotion = Promotion(blocks, targets, self._clock, self._clock() + limit)
        for i, block in enumerate(blocks):
            # In order, so that none is refused since its parent comes later. None: it is in the host, or gets no place.
            reserved = self._host.reserve(block)
            if not self._loaders.submit(partial(self._load, promotion, i, reserved)):
                self._counters.add("dropped")
                self._fail(promotion, i, reserved)
                break
        return promotion

    def store(self, block: BlockId, device_block: int) -> bool:
        """Have a block of the device kept, which must stay as it is until `finished` or `take_back` names it. False:
        too much waits, and it is not kept."""
        if block.key in self._forgotten:
            return False
        ticket = self._readings.add(device_block)
        if self._storers.submit(lambda: self._demote(block, device_block, ticket)):
            return True
        self._readings.remove(ticket)
        self._counters.add("dropped")
        return False

    def has(self, key: bytes) -> bool:
        """Return whether a block is in a tier; nobody asked for it."""
        return self._host.has(key) or (self._disk is not None and self._disk.has(key))

    def finished(self) -> list[int]:
        """Return the blocks of the device, given to `store`, that are read no more, each once."""
        return self._readings.finished()

    def take_back(self) -> list[int]:
        """Return all blocks of the device that were given to `store`: those that were not read yet are not kept.

        A copy that has begun is waited for.
        """
        return self._readings.take_back()

    def settle(self, seconds: float) -> bool:
        """Return whether all that `store` was given before this call is kept or refused within a time. The caller's
        thread waits for it."""
        done = threading.Event()
        return self._storers.submit(done.set) and done.wait(seconds)

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Have blocks found no more, nor those behind them: what they contain may be wrong."""
        keys = [block.key for block in blocks]
        with self._lock:
            self._forgotten.update(keys)
        for key in keys:
            self._host.remove(key)
        self._remove_forgotten()

    def pin(self, block: BlockId, seconds: float = float("inf")) -> bool:
        """Keep a block, and those before it, for a time, in the tiers that it is in. False: in none.

        The disk's part is done by the thread that stores, and is dropped where too much waits.
        """
        disk, until = self._disk, self._clock() + seconds
        on_disk = disk is not None and disk.find(block)
        if disk is not None and on_disk:
            self._storers.submit(lambda: disk.pin(block.key, until))
        if block.key in self._pins or self._host.pin(block.key):
            self._pins[block.key] = until
        return on_disk or block.key in self._pins

    def unpin(self, block: BlockId) -> None:
        """Take back what `pin` did."""
        disk = self._disk
        if disk is not None:
            self._storers.submit(lambda: disk.pin(block.key, 0.0))
        if self._pins.pop(block.key, None) is not None:
            self._host.unpin(block.key)

    def maintain(self) -> None:
        """Have done what is due with time; to be called now and then."""
        now = self._clock()
        if now - self._maintained < self._options.maintain_seconds:
            return
        self._maintained = now
        for key in [key for key, until in self._pins.items() if until <= now]:
            del self._pins[key]
            self._host.unpin(key)
        self._host.expire()
        self._remove_forgotten()
        if self._disk is not None:
            self._storers.submit(self._disk.maintain)

    def close(self) -> bool:
        """Write what only the host has to disk, as far as there is time, and give up the tiers. False: threads hang.

        The caller's thread waits for this. What is asked of the tiers afterwards is a miss.
        """
        if self._closed:
            return True
        self._closed = True
        until = self._clock() + self._options.close_seconds
        self._storers.submit(lambda: self._flush(until))
        stored = self._storers.close(self._options.close_seconds + 1.0)
        loaded = self._loaders.close(1.0)
        if self._disk is not None and stored and loaded:
            self._disk.close()
        return stored and loaded

    def _load(self, promotion: Promotion, i: int, reserved: Reserved | None) -> None:
        block = promotion.blocks[i]
        try:
            if not promotion.wants(i):
                self._missed(promotion, i, reserved)
            elif reserved is None and self._from_host(promotion, i, block):
                pass
            elif self._disk is None:
                self._missed(promotion, i, reserved)
            else:
                self._from_disk(promotion, i, block, reserved, self._disk)
        except BaseException:
            self._fail(promotion, i, reserved)
            raise

    def _from_host(self, promotion: Promotion, i: int, block: BlockId) -> bool:
        begin = self._clock()
        with self._host.reading(block) as found:
            if found is None:
                return False
            payload = found[0]
            self._deliver(promotion, i, HOST, payload, begin)
        return True

    def _from_disk(
        self, promotion: Promotion, i: int, block: BlockId, reserved: Reserved | None, disk: DiskStore
    ) -> None:
        begin = self._clock()
        payload = memoryview(bytearray(self._host.block_bytes)) if reserved is None else reserved.memory
        sum_ = disk.read(block, self._memory.layout, payload)
        if sum_ is None:
            self._missed(promotion, i, reserved)
            return
        self._deliver(promotion, i, DISK, payload, begin)
        if reserved is not None:
            self._host.publish(reserved, sum_)

    def _deliver(self, promotion: Promotion, i: int, tier: str, payload: memoryview, begin: float) -> None:
        seconds = self._clock() - begin
        copied = promotion.fill(i, tier, len(payload), seconds, lambda target: self._memory.write(target, payload))
        self._counters.add(f"promoted_{tier}" if copied else "load_cancelled" if promotion.cancelled else "load_late")
        self._counters.add(f"promote_{tier}_microseconds", round((self._clock() - begin) * 1e6))

    def _missed(self, promotion: Promotion, i: int, reserved: Reserved | None) -> None:
        late = self._clock() >= promotion.deadline
        self._counters.add("load_cancelled" if promotion.cancelled else "load_late" if late else "load_failed")
        self._fail(promotion, i, reserved)

    def _fail(self, promotion: Promotion, i: int, reserved: Reserved | None) -> None:
        promotion.fail(i)
        if reserved is not None:
            self._host.abandon(reserved)

    def _demote(self, block: BlockId, device_block: int, ticket: int) -> None:
        disk = self._disk if self._options.disk_after_hits == 0 else None
        reserved: Reserved | None = None
        past: memoryview | None = None
        try:
            with self._readings.reading(ticket) as wanted:
                if not wanted:
                    self._counters.add("dropped")
                    return
                reserved = self._host.reserve(block)
                if reserved is not None:
                    self._memory.read(device_block, reserved.memory)
                elif disk is not None and not self.has(block.key):
                    # The host has no place for it, as those before it fill it.
                    past = memoryview(bytearray(self._host.block_bytes))
                    self._memory.read(device_block, past)
        except BaseException:
            if reserved is not None:
                self._host.abandon(reserved)
            raise
        if reserved is not None:
            self._host.publish(reserved)
            self._counters.add("demoted")
        elif past is not None and disk is not None:
            stored = disk.put(block, self._memory.layout, past, checksum(past))
            self._counters.add("demoted" if stored else "refused")
        elif not self.has(block.key):
            self._counters.add("refused")
        if disk is not None and past is None:
            self._write(block, disk)

    def _remove_forgotten(self) -> None:
        with self._lock:
            keys = tuple(self._forgotten)
        if keys:
            self._storers.submit(lambda: self._remove(keys))

    def _remove(self, keys: Sequence[bytes]) -> None:
        """Behind all that was to be stored before."""
        for key in keys:
            self._host.remove(key)
            if self._disk is not None:
                self._disk.quarantine(key)
            with self._lock:
                self._forgotten.discard(key)

    def _spill(self, block: BlockId) -> None:
        """Have a block of the host written to disk, once."""
        disk = self._disk
        assert disk is not None
        with self._lock:
            if block.key in self._spilling:
                return
            self._spilling.add(block.key)

        def job() -> None:
            try:
                self._write(block, disk)
            finally:
                with self._lock:
                    self._spilling.discard(block.key)

        if not self._storers.submit(job):
            with self._lock:
                self._spilling.discard(block.key)
            self._counters.add("dropped")

    def _write(self, block: BlockId, disk: DiskStore) -> None:
        with self._host.reading(block) as found:
            if found is not None and not disk.put(block, self._memory.layout, *found):
                self._counters.add("refused")

    def _flush(self, until: float) -> None:
        if self._disk is None:
            return
        for block in self._host.blocks():
            if self._clock() >= until:
                self._counters.add("dropped")
            elif not self._disk.has(block.key):
                self._write(block, self._disk)
