"""What `value` learns, and that it finds as much as least recently used first or more."""

from __future__ import annotations

import functools
import math
import random

import pytest

from ktcompile.bench.cache import replay, synthetic, traces
from ktcompile.cache import policies
from ktcompile.cache.contest import Contest, Lead
from ktcompile.cache.costs import Recompute
from ktcompile.cache.leaf_first import LeafFirst
from ktcompile.cache.policy import Limits
from ktcompile.cache.recording import Recording
from ktcompile.cache.reuse import Reuse
from ktcompile.cache.value import Value

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)


@functools.cache
def traffic(kind: str, requests: int, seed: int) -> Recording:
    return traces.of_requests(synthetic.generate(kind, requests, seed), 16)


def found_by(name: str, found: Recording, share: float) -> int:
    """Return the tokens that a policy finds in a tier of a share of the distinct blocks."""
    policy = policies.make(name, Limits(round(share * traces.footprint(found))))
    return replay.replay(found, [replay.Tier(policy)], Recompute(1.0)).hit_tokens[0]


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_value_finds_no_less_than_lru(kind):
    found = traffic(kind, 150, 11)
    for share in SHARES:
        assert found_by("value", found, share) >= found_by("lru", found, share), share


@pytest.mark.parametrize("kind", ["documents", "system-prompts"])
def test_value_finds_more_than_lru_where_some_texts_are_popular(kind):
    found = traffic(kind, 600, 13)
    assert found_by("value", found, 0.1) > 1.04 * found_by("lru", found, 0.1)


class UpsideDown(Value):
    """What is likeliest to be used would go, where `wrong`."""

    wrong = True

    def value(self, block, now):
        return (-1 if self.wrong else 1) * super().value(block, now)


def test_a_rule_that_is_wrong_is_never_followed():
    found = traffic("documents", 300, 14)
    policy = Contest(Limits(round(0.1 * traces.footprint(found))), UpsideDown())
    score = replay.replay(found, [replay.Tier(policy)], Recompute(1.0))
    assert not policy.value.trusted
    assert score.hit_tokens[0] == found_by("lru", found, 0.1)


def test_who_is_in_charge_is_changed_and_changed_back():
    """Ten blocks are popular among others that come once; then the rule that has learned so goes wrong."""
    rule = UpsideDown()
    rule.wrong = False
    policy = Contest(Limits(20), rule)
    rng = random.Random(0)
    in_charge = []
    for now in range(6000):
        rule.wrong = now >= 4000
        key = rng.randrange(10) if now % 2 else now + 10
        policy.touch(key, float(now))
        if key not in policy:
            policy.insert(key, None, 1, 0, float(now))
        policy.check()
        policy._other.check()
        in_charge.append(rule.trusted)
    assert not in_charge[100] and in_charge[3900] and not in_charge[-1]


def test_a_lead_counts_requests_and_not_blocks():
    def leads(*requests):
        lead = Lead()
        for now, blocks in enumerate(requests):
            for _ in range(abs(blocks)):
                lead.add(1 if blocks > 0 else -1, float(now))
        return lead.add(0, float(len(requests)))

    assert not leads(500), "one request, however many blocks it had"
    assert not leads(3, -3, 3, -3, 3, -3, 3) and not leads(*[-2] * 50)
    assert not leads(*[2] * 9) and leads(*[2] * 10) and leads(2, -2, *[2] * 20)


def waits(seed: int, law, kind: int, reuse: Reuse, count: int = 8000) -> None:
    """Blocks of a kind wait for their next uses, after seconds that follow a law of u, even in (0, 1)."""
    rng = random.Random(seed)
    for start in range(count):
        reuse.begin(kind, float(start))
        wait = law(rng.random())
        reuse.end(kind, float(start), start + min(wait, 5000.0), wait < 5000.0)


def test_chances_are_those_of_the_waits():
    reuse = Reuse(2)
    waits(0, lambda u: -300.0 * math.log(u), 0, reuse)
    waits(1, lambda u: -3000.0 * math.log(u), 1, reuse)
    for kind, mean in ((0, 300.0), (1, 3000.0)):
        for unused in (60.0, 200.0, 700.0):
            chance = 1 - math.exp(-200.0 / mean)
            assert reuse.chance(kind, unused, 200.0) == pytest.approx(chance, rel=0.3), (kind, unused)


def test_before_anything_is_known_the_chance_falls_with_the_time():
    reuse = Reuse(2)
    chances = [reuse.chance(0, unused, 100.0) for unused in (0.0, 10.0, 100.0, 1e3, 1e5, 1e9)]
    assert chances == sorted(chances, reverse=True) and 0 <= chances[-1] < chances[0] < 1
    assert reuse.chance(1, 10.0, 100.0) == chances[1]


def test_a_block_that_is_lost_says_nothing():
    reuse = Reuse(1)
    for start in range(100):
        reuse.begin(0, float(start))
    for start in range(100):
        reuse.forget(0, float(start))
    assert not +reuse._waiting[0] and not any(map(any, reuse._used + reuse._lost))


def test_value_learns_that_used_blocks_are_used_again():
    rule = Value()
    policy = LeafFirst(Limits(100), rule)
    for now in range(6000):
        for key in (now % 40, now + 100):
            policy.touch(key, float(now))
            if key not in policy:
                policy.insert(key, None, 1, 0, float(now))
    assert rule.reuse.chance(5, 30.0, 60.0) > 0.5 > 10 * rule.reuse.chance(0, 30.0, 60.0)


class Counted(float):
    """A time that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        Counted.comparisons += 1
        return float(self) < float(other)

    def __eq__(self, other):
        Counted.comparisons += 1
        return float(self) == float(other)

    __hash__ = float.__hash__


@pytest.mark.parametrize("name", ["value", "lru"])
def test_a_call_compares_few_blocks_however_many_there_are(name):
    """Heaps are compared by time of use: 10^5 blocks take a few more comparisons than 10^3, and not a hundred times."""

    def comparisons(blocks: int, calls: int = 1000) -> float:
        rng = random.Random(0)
        policy = policies.make(name, Limits(blocks))
        for key in range(blocks):
            policy.insert(key, None, 1, 0, Counted(key))
        Counted.comparisons = 0
        for now in range(blocks, blocks + calls):
            policy.touch(rng.randrange(blocks), Counted(now))
            policy.insert(now, None, 1, 0, Counted(now))
        return Counted.comparisons / calls

    few, many = comparisons(1_000), comparisons(100_000)
    assert 1 < many <= 2.5 * few, (few, many)
