"""Whole worlds of the scheduler, each from a seed: who comes when, how long they stay, and who leaves early."""

from __future__ import annotations

import random
import sys

import pytest
from helpers.serving import Client, World

from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError

WORLDS = 1000


def play(seed: int) -> World:
    """Let a world run to its end, checking each step."""
    rng = random.Random(seed)
    chunk_size, seqs, block_size = rng.choice([1, 2, 4, 8, 16]), rng.randint(1, 8), rng.choice([1, 2, 4, 16])
    options = SchedulerOptions(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs - 1 + chunk_size + rng.choice([0, 1, 5, 30]),
        max_model_len=64,
        block_size=block_size,
        chunk_size=chunk_size,
        max_queued_requests=rng.choice([2, 5, 100]),
        max_queued_tokens=rng.choice([30, 1000]),
    )
    # From one that serves hardly any to one that never preempts.
    world = World(options, num_blocks=max(1, rng.choice([20, 30, 40, 60, 400]) // block_size))
    arrivals = sorted(rng.expovariate(1.0) * rng.choice([1, 20]) for _ in range(rng.randint(1, 20)))
    impatient, rude = rng.choice([0.0, 0.3]), rng.choice([0.0, 0.05])
    steps, bound, order = 0, 0, 0
    while arrivals or world.left:
        while arrivals and arrivals[0] <= world.now:
            client = _client(rng, order, arrivals.pop(0), impatient)
            order += 1
            try:
                world.add(client)
            except (QueueFullError, RequestTooLongError):
                continue
            # The oldest goes on in each step. Its chunks, its answer, and all of it anew in the worst case.
            tokens = len(client.prompt) + client.length
            bound += -(-tokens // chunk_size) + 1 + client.length
        if not world.left:
            world.now = max([world.now, *arrivals[:1]])
            continue
        if rng.random() < rude:
            world.cancel(rng.choice(list(world.left)))
        world.begin_step()
        if world.step is None:
            continue
        if rng.random() < rude and world.left:
            world.cancel(rng.choice(list(world.left)))
        world.now += rng.uniform(0.1, 1.0)
        world.end_step()
        world.check_pool()
        steps += 1
        assert steps <= bound, "requests wait for ever"
    assert world.first_tokens == sorted(world.first_tokens)
    for client in world.clients.values():
        world.check_client(client)
    return world


def _client(rng: random.Random, order: int, now: float, impatient: float) -> Client:
    prompt, length = rng.choice([1, 3, 10, 35]), rng.choice([1, 3, 10, 25])
    own = [rng.randrange(100) for _ in range(rng.randint(1, prompt))]
    shared = [rng.choice([0, 1])] * rng.choice([0, 0, 5, 16, 20])
    return Client(
        order,
        (shared + own)[:35],
        length,
        length + rng.choice([0, 0, 3]),
        deadline=now + rng.uniform(0, 15) if rng.random() < impatient else None,
        prompt_logits=rng.random() < 0.2,
        root=rng.choice([None, b"a", b"b", b"b", b"b"]),
    )


@pytest.mark.parametrize("part", range(10))
def test_worlds(part):
    ended, preemptions, hits = dict.fromkeys(("complete", "cancelled", "expired"), 0), 0, 0
    for seed in range(part, WORLDS, 10):
        try:
            world = play(seed)
        except BaseException:
            print(f"play({seed}) fails", file=sys.stderr)
            raise
        preemptions += world.preemptions
        hits += world.hits
        assert world.preemptions == world.scheduler.num_preemptions
        for client in world.clients.values():
            ended[client.ended] += 1
    # The worlds are such that all of it happens.
    assert preemptions > 9 and hits > 100 and ended["complete"] > 400 and min(ended.values()) > 5


def test_a_world_is_the_same_each_time():
    assert play(7).first_tokens == play(7).first_tokens != []
