"""Worlds of the scheduler with tiers behind the device: loads that come, come late, fail, or never do."""

from __future__ import annotations

import random
import sys

import pytest
from helpers.serving import Client
from helpers.tiered_world import TieredWorld

from ktcompile.cache.counters import Counters
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError

WORLDS = 400
ROOTS = (None, b"a" * 32, b"b" * 32, b"b" * 32)


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
