"""Policies of the prefix cache against a plain model of a tier, and what all of them must keep to."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.cache import policies
from ktcompile.cache.costs import Load, Recompute, Worth
from ktcompile.cache.leaf_first import LeafFirst
from ktcompile.cache.lru import Lru
from ktcompile.cache.policy import Limits
from ktcompile.cache.sketch import Sketch
from ktcompile.cache.value import Value

TENANTS = ("", "a", "b")
# A forest: the parent of each of some blocks, their positions, their owners.
PARENTS = {k: None if k < 3 else (k * 7 + 3) % k for k in range(24)}
POSITION = {k: 0 if PARENTS[k] is None else -1 for k in PARENTS}
for _key, _parent in PARENTS.items():
    if _parent is not None:
        POSITION[_key] = POSITION[_parent] + 16


class TierMachine(RuleBasedStateMachine):
    """Blocks come, are used, pinned, lost and given up; `model` has [last use, pins, tenant] of those that are here."""

    name = "lru"

    @initialize(
        capacity=st.integers(1, 30),
        ttl=st.none() | st.integers(1, 12),
        quotas=st.dictionaries(st.sampled_from(TENANTS), st.integers(0, 20)),
        quota=st.none() | st.integers(0, 20),
    )
    def begin(self, capacity, ttl, quotas, quota):
        self.limits = Limits(capacity, ttl, quota, quotas)
        self.policy = policies.make(self.name, self.limits)
        self.model: dict[int, list] = {}
        self.size = {k: 1 + k % 3 for k in PARENTS}
        self.now = 0.0

    def tick(self):
        self.now += 1.0

    @rule(key=st.sampled_from(sorted(PARENTS)), tenant=st.sampled_from(TENANTS))
    def insert(self, key, tenant):
        if key in self.model:
            return
        self.tick()
        parent, size = PARENTS[key], self.size[key]
        before = dict(self.model)
        fits, gone = self.policy.insert(key, parent, size, POSITION[key], self.now, tenant)
        self.give_up(gone, kept={parent})
        if self.name == "lru":
            self.check_insert(before, key, tenant, fits, gone)
        if fits:
            self.model[key] = [self.now, 0, tenant]

    @rule(key=st.sampled_from(sorted(PARENTS)))
    def touch(self, key):
        self.tick()
        self.policy.touch(key, self.now)
        if key in self.model:
            self.model[key][0] = self.now

    @rule(size=st.integers(0, 10))
    def evict(self, size):
        before = dict(self.model)
        gone = self.policy.evict(size, self.now)
        self.give_up(gone)
        freed = sum(self.size[k] for k in gone)
        assert freed >= size or not self.may_go()
        assert freed - (self.size[gone[-1]] if gone else 0) < max(size, 1), "more went than was asked for"
        if self.name == "lru":
            self.check_order(before, gone)

    @rule(seconds=st.integers(0, 6))
    def expire(self, seconds):
        self.now += seconds
        gone = self.policy.expire(self.now)
        self.give_up(gone)
        if self.limits.ttl is None:
            assert not gone
        else:
            assert not [k for k in self.may_go() if self.model[k][0] + self.limits.ttl <= self.now]

    @rule(key=st.sampled_from(sorted(PARENTS)))
    def remove(self, key):
        assert self.policy.remove(key) == (self.model.pop(key, None) is not None)

    @rule(key=st.sampled_from(sorted(PARENTS)))
    def pin(self, key):
        assert self.policy.pin(key) == (key in self.model)
        if key in self.model:
            self.model[key][1] += 1

    @precondition(lambda self: any(pins for _, pins, _ in self.model.values()))
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from(sorted(k for k, (_, pins, _) in self.model.items() if pins)))
        assert self.policy.unpin(key)
        self.model[key][1] -= 1

    @invariant()
    def what_is_here_is_known(self):
        self.policy.check()
        assert {k for k in PARENTS if k in self.policy} == set(self.model)
        assert len(self.policy) == len(self.model)
        assert self.policy.used == sum(self.size[k] for k in self.model) <= self.limits.capacity
        for tenant in TENANTS:
            used = self.used_by(tenant)
            assert self.policy.used_by(tenant) == used
            assert used <= (self.limits.capacity if self.quota_of(tenant) is None else self.quota_of(tenant))

    def give_up(self, gone, kept=()):
        """Each block that goes has no child here and no pin at that moment."""
        for key in gone:
            assert key not in kept
            assert key in self.may_go()
            del self.model[key]

    def check_insert(self, before, key, tenant, fits, gone):
        """The naive rule of LRU gives the same answer."""
        model, expected = dict(before), []
        room = self.quota_of(tenant)
        fit = self.size[key] <= (self.limits.capacity if room is None else min(room, self.limits.capacity))
        while fit:
            own = room is not None and self.used_by(tenant, model) + self.size[key] > room
            if not own and sum(self.size[k] for k in model) + self.size[key] <= self.limits.capacity:
                break
            leaves = [k for k in self.may_go(model) if k != PARENTS[key] and (not own or model[k][2] == tenant)]
            if not leaves:
                fit = False
                break
            victim = min(leaves, key=lambda k: model[k][0])
            expected.append(victim)
            del model[victim]
        assert (fits, gone) == (fit, expected)

    def check_order(self, before, gone):
        model = dict(before)
        for key in gone:
            assert key == min(self.may_go(model), key=lambda k: model[k][0])
            del model[key]

    def may_go(self, model=None):
        model = self.model if model is None else model
        parents = {PARENTS[k] for k in model}
        return [k for k, (_, pins, _) in model.items() if k not in parents and not pins]

    def used_by(self, tenant, model=None):
        return sum(self.size[k] for k, v in (self.model if model is None else model).items() if v[2] == tenant)

    def quota_of(self, tenant):
        return self.limits.quotas.get(tenant, self.limits.quota)


class WTinyLfuMachine(TierMachine):
    name = "wtinylfu"


class ValueMachine(TierMachine):
    name = "value"


TestLru = TierMachine.TestCase
TestWTinyLfu = WTinyLfuMachine.TestCase
TestValue = ValueMachine.TestCase
for _case in (TestLru, TestWTinyLfu, TestValue):
    _case.settings = settings(max_examples=40, stateful_step_count=40)


def test_the_end_of_a_prompt_goes_before_its_beginning():
    policy = policies.make("lru", Limits(4))
    for position, key in enumerate("abcd"):
        policy.insert(key, "abcd"[position - 1] if position else None, 1, position, 5.0)
    assert policy.evict(3, 6.0) == ["d", "c", "b"]


def test_a_block_waits_for_its_parent_elsewhere():
    """A tier may have a block without what it continues, which then comes later and goes later."""
    policy = policies.make("lru", Limits(2))
    policy.insert("child", "parent", 1, 16, 1.0)
    policy.insert("parent", None, 1, 0, 2.0)
    policy.touch("child", 3.0)
    assert policy.evict(2, 4.0) == ["child", "parent"]


def test_a_block_does_not_take_the_place_of_the_one_it_continues():
    policy = policies.make("lru", Limits(1))
    policy.insert("parent", None, 1, 0, 1.0)
    assert policy.insert("child", "parent", 1, 16, 2.0) == (False, [])
    assert "parent" in policy


def test_names_and_limits():
    with pytest.raises(ValueError, match="policy 'best' is unknown; there are"):
        policies.make("best", Limits(1))
    for wrong, words in (
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 1, "ttl": 0.0}, "ttl is 0.0"),
        ({"capacity": 1, "quota": -1}, "the quota of others is -1"),
        ({"capacity": 1, "quotas": {"a": -2}}, "the quota of 'a' is -2"),
    ):
        with pytest.raises(ValueError, match=words):
            Limits(**wrong)


def scan_among_popular(name: str) -> int:
    """Return how often one of ten popular blocks was found while 2,000 others came once, in a tier of 20."""
    policy = policies.make(name, Limits(20))
    rng, hits = random.Random(0), 0
    for now in range(4000):
        key = rng.randrange(10) if now % 2 else now + 10
        hits += now % 2 and key in policy
        policy.touch(key, float(now))
        if key not in policy:
            policy.insert(key, None, 1, 0, float(now))
    return hits


def test_what_comes_once_does_not_displace_what_is_popular():
    hits = {name: scan_among_popular(name) for name in policies.NAMES}
    assert hits["lru"] < 1700 < hits["value"] and hits["wtinylfu"] > 1700, hits


def test_late_positions_are_worth_more_and_slow_loads_less():
    worth = Worth(Recompute(1.0, 1 / 100), block_size=16, weight=1.0)
    rule = Value(worth)
    rule.trusted = True
    policy = LeafFirst(Limits(2), rule)
    policy.insert("late", "elsewhere", 1, 40_000, 1.0)
    policy.insert("early", None, 1, 0, 1.0)
    assert policy.evict(1, 2.0) == ["early"]
    useless = Worth(Recompute(1.0, 1 / 100), Load(0.0, 1 / 20), block_size=16)
    policy = policies.make("value", Limits(2), useless)
    policy.insert("early", None, 1, 0, 1.0)
    policy.insert("late", "elsewhere", 1, 40_000, 0.0)
    assert policy.evict(1, 2.0) == ["early"], "to load it takes longer than to compute it"


def test_a_sketch_counts_and_forgets():
    sketch = Sketch(64)
    for number in range(64):
        for _ in range(number % 8):
            sketch.add(number)
    assert all(sketch.count(number) >= number % 8 for number in range(64))
    assert sum(sketch.count(number) - number % 8 for number in range(64)) < 64
    key = b"k" * 32
    for _ in range(20):
        sketch.add(key)
    assert sketch.count(key) == 15
    for number in range(1000):
        sketch.add(number)
    assert sketch.count(key) < 12


def test_places_of_keys_are_the_same_in_each_process():
    assert Sketch(64)._places(b"k" * 32) == [22, 14, 56, 17]


def test_an_order_stays_as_small_as_what_is_in_it():
    policy = LeafFirst(Limits(10), Lru())
    for now in range(10):
        policy.insert(now, None, 1, 0, float(now))
    for now in range(10_000):
        policy.touch(now % 10, float(now))
    (order,) = policy._orders
    assert len(order) <= 65
