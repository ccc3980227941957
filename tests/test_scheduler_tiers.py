"""Worlds of the scheduler with tiers behind the device: loads that come, come late, fail, or never do."""

from __future__ import annotations

import random
import struct
import sys
from collections import deque

import pytest
from helpers.serving import Client, World

from ktcompile.cache.counters import Counters
from ktcompile.cache.host import HostStore, arena
from ktcompile.cache.policies import make
from ktcompile.cache.policy import Limits
from ktcompile.cache.rates import Rates
from ktcompile.cache.tiers import TierOptions, Tiers
from ktcompile.cache.workers import Job
from ktcompile.scheduler.behind import Behind
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError
from ktcompile.scheduler.scheduler import Scheduler

WORLDS = 400
ROOTS = (None, b"a" * 32, b"b" * 32, b"b" * 32)


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
    """A world whose blocks are kept in a host of `slots` blocks. Its storage is the memory that tiers copy from."""

    layout = "tokens"

    def __init__(self, options: SchedulerOptions, num_blocks: int, slots: int, longest: int) -> None:
        super().__init__(options, num_blocks)
        self.loaders, self.storers, counters = Jobs(longest), Jobs(longest), Counters()
        size = 8 * options.block_size
        policy = make("lru", Limits(slots * size))
        self.arena = arena(slots * size)
        self.host = HostStore(self.arena, size, policy, lambda: self.now, counters)
        limits = TierOptions(load_seconds=3.0)
        self.tiers = Tiers(self, self.host, None, self.loaders, self.storers, lambda: self.now, counters, limits)
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


def play(seed: int) -> TieredWorld:
    """Let a world run to its end. Threads do what they like: all, nothing for long, the one without the other."""
    rng = random.Random(seed)
    chunk_size, seqs, block_size = rng.choice([1, 4, 8]), rng.randint(1, 6), rng.choice([1, 2, 4])
    options = SchedulerOptions(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs - 1 + chunk_size + rng.choice([0, 5, 30]),
        max_model_len=64,
        block_size=block_size,
        chunk_size=chunk_size,
    )
    num_blocks = max(1, rng.choice([35, 40, 60]) // block_size)
    world = TieredWorld(options, num_blocks, rng.choice([2, 20, 100]), rng.choice([1, 4, 100]))
    arrivals = sorted(rng.expovariate(1.0) * rng.choice([1, 30]) for _ in range(rng.randint(5, 40)))
    eager = {world.loaders: rng.choice([0.0, 0.2, 1.0]), world.storers: rng.choice([0.2, 1.0, 1.0])}
    rotten, rude = rng.choice([0.0, 0.1]), rng.choice([0.0, 0.2])
    order = 0
    for _ in range(10_000):
        while arrivals and arrivals[0] <= world.now:
            client, order = _client(rng, order, arrivals.pop(0)), order + 1
            try:
                world.add(client)
            except (QueueFullError, RequestTooLongError):
                continue
        if not world.left and not arrivals:
            break
        if not world.left:
            world.now = max(world.now, arrivals[0])
        for workers, share in eager.items():
            if rng.random() < share:
                workers.run(rng.randint(1, 20))
        if rng.random() < rotten:
            world.arena[rng.randrange(len(world.arena))] ^= 1
        if world.left and rng.random() < rude:
            world.cancel(rng.choice(sorted(world.loading) or list(world.left)))
        world.begin_step()
        world.now += rng.uniform(0.1, 1.0)
        if world.step is not None:
            world.end_step()
        world.check_pool()
    assert not world.left, "requests wait for ever"
    world.tiers.close()
    world.loaders.close(0)
    world.scheduler.give_back()
    assert world.pool.num_held == 0 and world.scheduler.num_running == 0
    for client in world.clients.values():
        world.check_client(client)
    return world


def _client(rng: random.Random, order: int, now: float) -> Client:
    length = rng.choice([1, 3, 10])
    own = [rng.randrange(100) for _ in range(rng.choice([1, 3, 10]))]
    shared = [rng.randrange(5)] * rng.choice([0, 12, 20])
    deadline = now + rng.uniform(0, 20) if rng.random() < 0.1 else None
    return Client(order, shared + own, length, length, deadline, rng.random() < 0.1, rng.choice(ROOTS))


@pytest.mark.parametrize("part", range(4))
def test_worlds_with_loads(part: int) -> None:
    preemptions, loaded, seen = 0, 0, Counters().snapshot()
    for seed in range(part, WORLDS, 4):
        try:
            world = play(seed)
        except BaseException:
            print(f"play({seed}) fails", file=sys.stderr)
            raise
        preemptions, loaded = preemptions + world.scheduler.num_preemptions, loaded + world.loaded
        seen = {name: number + seen[name] for name, number in world.tiers.counters.items()}
    # The worlds are such that all of it happens.
    assert preemptions > 10 and loaded > 50 and seen["promoted_host"] > 50
    for name in ("demoted", "dropped", "load_late", "load_cancelled", "host_verify_failed", "host_evicted"):
        assert seen[name] > 0, f"{name} does not happen"
