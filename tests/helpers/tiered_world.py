"""Worlds of the scheduler with tiers behind the device, whose threads run when the world says so."""

from __future__ import annotations

import struct
from collections import deque

from helpers.cache_blocks import disk_store
from helpers.fault_folder import FaultFolder
from helpers.serving import World
from ktcompile.cache.counters import Counters
from ktcompile.cache.host import HostStore, arena
from ktcompile.cache.policies import make
from ktcompile.cache.policy import Limits
from ktcompile.cache.rates import Rates
from ktcompile.cache.tiers import TierOptions, Tiers
from ktcompile.cache.workers import Job
from ktcompile.scheduler.behind import Behind
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.scheduler import Scheduler


class Jobs:
    """Workers whose jobs run when the world says so."""

    def __init__(self, longest: int) -> None:
        self.jobs: deque[Job] = deque()
        self.longest = longest

    def submit(self, job: Job) -> bool:
        if len(self.jobs) >= self.longest:
            return False
        self.jobs.append(job)
        return True

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.jobs))):
            self.jobs.popleft()()

    def close(self, seconds: float) -> bool:
        self.run(len(self.jobs))
        return True


class TieredWorld(World):
    """A world whose blocks are kept in a host of `slots` blocks, and in a folder if there is one. Its storage is the
    memory that tiers copy from."""

    layout = "tokens"

    def __init__(
        self,
        options: SchedulerOptions,
        num_blocks: int,
        slots: int,
        longest: int,
        folder: FaultFolder | None = None,
        disk_after_hits: int = 1,
    ) -> None:
        super().__init__(options, num_blocks)
        self.loaders, self.storers, counters = Jobs(longest), Jobs(longest), Counters()
        size = 8 * options.block_size
        policy = make("lru", Limits(max(1, slots * size)))
        self.arena = arena(slots * size)
        self.host = HostStore(self.arena, size, policy, lambda: self.now, counters)
        limits = TierOptions(disk_after_hits=disk_after_hits, load_seconds=3.0)
        disk = None if folder is None else disk_store(folder, counters=counters, clock=lambda: self.now)
        self.tiers = Tiers(self, self.host, disk, self.loaders, self.storers, lambda: self.now, counters, limits)
        behind = Behind(self.tiers, self.pool, Rates(options.block_size, size), options.block_size)
        self.scheduler = Scheduler(options, self.pool, lambda: self.now, behind)
        self.loaded = 0

    def read(self, block: int, out: memoryview) -> None:
        size = self.options.block_size
        out[:] = struct.pack(f"<{size}q", *self.storage[block * size : (block + 1) * size])  # type: ignore[arg-type]

    def write(self, block: int, payload: memoryview) -> None:
        size = self.options.block_size
        assert self.pool.name_of(block) is None and self.pool.holders(block) == 1
        self.storage[block * size : (block + 1) * size] = struct.unpack(f"<{size}q", payload)

    def begin_step(self) -> None:
        for name in self.scheduler.expire():
            self.clients[name].ended = "expired"
        running = {name for name, client in self.left.items() if client.computed}
        self.step = self.scheduler.schedule()
        self.check_pool()
        resident = {request.request_id for request in self.scheduler._running}
        for name in running - resident:
            self.clients[name].computed = 0
        if self.step is None:
            assert not self.left or self.loading
            return
        assert resident.isdisjoint(self.step.preempted)
        orders = [self.clients[chunk.request_id].order for chunk in self.step.chunks]
        assert orders == sorted(set(orders))
        decoding = {name for name in running if self.clients[name].tokens and self._decodes(name)}
        assert decoding <= {chunk.request_id for chunk in self.step.chunks}, "a decode waits"
        for start in self.step.started:
            tiers = () if start.loaded is None else start.loaded.tiers
            self.loaded += len(tiers)
            assert len(tiers) * self.options.block_size <= start.num_cached_tokens
            assert start.num_cached_tokens < len(self.clients[start.request_id].prompt)
        for chunk in self.step.chunks:
            client = self.clients[chunk.request_id]
            assert client.computed in (0, chunk.begin)
            assert chunk.request_id not in self.loading
            assert list(chunk.token_ids) == (client.prompt + client.tokens)[chunk.begin : chunk.end]
            for block in chunk.block_table[chunk.begin // self.options.block_size :]:
                assert self.pool.holders(block) == 1 and self.pool.name_of(block) is None, "a shared block is written"

    def check_pool(self) -> None:
        self.pool.check()
        self.scheduler.check()
        self.host.check()
        size = self.options.block_size
        for block in range(self.pool.num_blocks):
            name = self.pool.name_of(block)
            found = tuple(self.storage[block * size : (block + 1) * size])
            assert name is None or name.token_ids == found, "a block is found by the name of another content"

    @property
    def loading(self) -> set[str]:
        return {request.request_id for request in self.scheduler._running if request.loading}

    def _decodes(self, name: str) -> bool:
        return self.clients[name].computed == self._known(self.clients[name]) - 1
