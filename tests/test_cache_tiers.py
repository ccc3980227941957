"""Host memory and disk together: a model in a dictionary, faults of every kind, and real threads."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Sequence

import pytest
from helpers.cache_blocks import LAYOUT, Clock, blocks, disk_store, host_store, payload, sequence
from helpers.fault_folder import Disk, Fault, FaultFolder
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ktcompile.cache.block_id import BlockId
from ktcompile.cache.counters import Counters
from ktcompile.cache.tiers import DISK, HOST, TierOptions, Tiers
from ktcompile.cache.workers import Job, Threads

TARGETS = range(100, 200)


class Device:
    """Blocks of a device, by number. written: those that were written to."""

    layout = LAYOUT

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.written: list[int] = []

    def read(self, block: int, out: memoryview) -> None:
        out[:] = self.blocks[block]

    def write(self, block: int, content: memoryview) -> None:
        self.written.append(block)
        self.blocks[block] = bytes(content)


class Steps:
    """Workers whose jobs run when a test says so."""

    def __init__(self, longest: int = 1000) -> None:
        self.jobs: deque[Job] = deque()
        self.longest, self.open = longest, True

    def submit(self, job: Job) -> bool:
        if not self.open or len(self.jobs) >= self.longest:
            return False
        self.jobs.append(job)
        return True

    def run(self, count: int | None = None) -> None:
        while self.jobs and count != 0:
            self.jobs.popleft()()
            count = None if count is None else count - 1

    def close(self, seconds: float) -> bool:
        self.open = False
        self.run()
        return True


class World:
    """Tiers over a device, with what is put in them. disk: None for none."""

    def __init__(self, disk: Disk | None, slots: int = 4, fault: Fault | None = None, **options: object) -> None:
        self.clock, self.counters, self.device = Clock(), Counters(), Device()
        self.loaders, self.storers = Steps(), Steps()
        self.host = host_store(slots, counters=self.counters)
        self.folder = FaultFolder(disk, fault) if disk is not None else None
        self.disk = None
        if self.folder is not None:
            self.disk = disk_store(self.folder, counters=self.counters, clock=self.clock, width=1)
        shared = (self.loaders, self.storers, self.clock, self.counters, TierOptions(**options))
        self.tiers = Tiers(self.device, self.host, self.disk, *shared)

    def store(self, some: Sequence[BlockId], run: bool = True) -> None:
        for i, block in enumerate(some):
            self.device.blocks[i] = payload(block)
            self.tiers.store(block, i)
        if run:
            self.storers.run()

    def promote(self, some: Sequence[BlockId]) -> tuple[str, ...]:
        """Return the tiers that blocks came from. AssertionError: a block of the device has the wrong bytes."""
        promotion = self.tiers.promote(some, TARGETS[: len(some)])
        self.loaders.run()
        loaded = promotion.result()
        assert loaded is not None
        for block, target in zip(some[: len(loaded.tiers)], TARGETS, strict=False):
            assert self.device.blocks[target] == payload(block), "wrong bytes were served"
        return loaded.tiers

    def seen(self, name: str) -> int:
        return self.tiers.counters[name]


def test_what_was_stored_comes_back_from_the_host():
    world, some = World(None), blocks(3)
    world.store(some)
    assert world.tiers.finished() == [0, 1, 2] and world.tiers.finished() == []
    assert world.tiers.lookup([*some, *blocks(1, 7)]) == [HOST] * 3
    assert world.promote(some) == (HOST,) * 3
    assert world.seen("promoted_host") == world.seen("host_hit") == 3
    assert world.seen("queries") == 4 and world.seen("miss") == 1


def test_a_block_goes_to_disk_once_it_was_a_hit_and_all_at_the_end():
    """Museum 12 and 21: what is on disk is found there, and each block is written once."""
    disk = Disk()
    world, some = World(disk), blocks(3)
    world.store(some)
    assert not world.disk.entries()
    for _ in range(3):
        world.tiers.lookup(some[:2])
    world.storers.run()
    assert [entry.key for entry in world.disk.entries()] == [block.key for block in some[:2]]
    assert world.seen("disk_stored") == 2
    assert world.tiers.close()
    again = World(disk)
    assert again.tiers.lookup(some) == [DISK] * 3
    assert again.promote(some) == (DISK,) * 3
    assert again.tiers.lookup(some) == [HOST] * 3
    assert again.promote(some) == (HOST,) * 3


def test_each_block_goes_to_disk_at_once_where_that_is_said():
    world, some = World(Disk(), disk_after_hits=0), blocks(6)
    world.store(some)
    assert len(world.disk) == 6 and len(world.host) == 4


def test_blocks_of_several_tiers_make_one_prefix():
    world, some = World(Disk(), disk_after_hits=0), blocks(6)
    world.store(some)
    assert world.tiers.lookup(some) == [HOST] * 4 + [DISK] * 2
    assert world.promote(some) == (HOST,) * 4 + (DISK,) * 2


def test_what_follows_a_block_that_cannot_be_read_is_a_miss():
    """Museum 5 and 8."""
    disk = Disk()
    World(disk, disk_after_hits=0).store(blocks(4))
    world, some = World(disk), blocks(4)
    assert world.tiers.lookup(some) == [DISK] * 4
    disk.data[disk.names[next(n for n in disk.names if n.startswith(some[2].key.hex()))]][-1] ^= 1
    assert world.promote(some) == (DISK,) * 2
    assert world.seen("disk_verify_failed") == 1 and world.seen("load_failed") == 2
    assert world.tiers.lookup(some) == [HOST] * 2
    world.host.check()


def test_a_load_that_comes_late_touches_no_block_of_the_device():
    """Museum 10 and 13: blocks are the caller's again at the deadline, whatever threads do."""
    disk = Disk()
    World(disk, disk_after_hits=0).store(blocks(3))
    world, some = World(disk), blocks(3)
    promotion = world.tiers.promote(some, TARGETS[:3], seconds=1.0)
    world.loaders.run(1)
    assert promotion.result() is None
    world.clock.now += 2
    assert promotion.result().tiers == (DISK,)
    world.loaders.run()
    assert world.device.written == [TARGETS[0]]
    assert world.seen("load_late") == 2
    assert promotion.result().tiers == (DISK,)
    world.host.check()
    assert world.tiers.lookup(some)[0] == HOST


def test_a_copy_that_runs_at_the_deadline_is_waited_for():
    disk, entered, go = Disk(), threading.Event(), threading.Event()
    World(disk, disk_after_hits=0).store(blocks(1))
    world, some = World(disk), blocks(1)
    write = world.device.write

    def slow(block: int, content: memoryview) -> None:
        entered.set()
        go.wait(10)
        write(block, content)

    world.device.write = slow
    promotion = world.tiers.promote(some, TARGETS[:1], seconds=1.0)
    thread = threading.Thread(target=world.loaders.run)
    thread.start()
    entered.wait(10)
    world.clock.now += 2
    results = []
    other = threading.Thread(target=lambda: results.append(promotion.result()))
    other.start()
    time.sleep(0.05)
    assert not results
    go.set()
    other.join(10)
    thread.join(10)
    assert results[0].tiers == (DISK,) and world.device.blocks[TARGETS[0]] == payload(some[0])


def test_full_queues_drop_and_say_so():
    """Museum 15."""
    world, some = World(Disk(), disk_after_hits=0), blocks(4)
    world.storers.longest = 2
    assert [world.tiers.store(block, 0) for block in some] == [True, True, False, False]
    assert world.seen("dropped") == 2
    world.device.blocks[0] = payload(some[0])
    world.storers.longest = 1000
    world.storers.jobs.clear()
    world.store(some)
    world.loaders.longest = 2
    assert world.promote(some) == (HOST, HOST)


def test_damaged_memory_of_the_host_is_a_miss():
    world, some = World(None), blocks(3)
    world.store(some)
    with world.host.reading(some[1]) as found:
        found[0][3] ^= 1
    assert world.tiers.lookup(some) == [HOST] * 3
    assert world.promote(some) == (HOST,)
    assert world.seen("host_verify_failed") == 1
    assert world.tiers.lookup(some) == [HOST]
    world.host.check()


def test_an_equal_key_of_other_tokens_is_not_in_the_host():
    """Museum 1."""
    world, block = World(None), blocks(1)[0]
    world.store([block])
    other = BlockId(block.key, block.parent, block.namespace, block.position, (5, 5, 5, 5))
    assert world.tiers.lookup([other]) == []
    assert world.promote([other]) == ()


def test_tenants_share_nothing():
    world = World(Disk(), slots=8, disk_after_hits=0)
    ours, theirs = blocks(3, tenant="a"), blocks(3, tenant="b")
    world.store(ours)
    assert world.tiers.lookup(theirs) == [] and world.promote(theirs) == ()
    assert world.tiers.lookup(ours) == [HOST] * 3


def test_a_pinned_prefix_stays_for_its_time():
    world, some = World(Disk(), slots=3, disk_after_hits=0), blocks(2)
    world.store(some)
    assert world.tiers.pin(some[1], 100)
    assert not world.tiers.pin(blocks(1, 9)[0])
    for seed in range(1, 6):
        world.store(blocks(1, seed))
    assert world.tiers.lookup(some) == [HOST] * 2
    world.clock.now += 200
    world.tiers.maintain()
    world.storers.run()
    for seed in range(6, 12):
        world.store(blocks(1, seed))
    assert world.tiers.lookup(some) != [HOST] * 2


def test_the_engine_goes_on_when_the_disk_fails():
    world = World(Disk(), slots=2, fault=Fault(1, errno.EIO, sticky=True), disk_after_hits=0)
    for seed in range(5):
        some = blocks(2, seed)
        world.store(some)
        world.tiers.maintain()
        assert world.promote(some) == (HOST,) * 2
    assert world.seen("disk_breaker_opened") == 1 and not world.disk.entries()
    assert len(world.tiers.finished()) == 10


def test_a_copy_that_fails_is_no_block_and_gives_the_device_its_block_back():
    """Museum 3."""
    world, some = World(None), blocks(2)
    world.device.blocks[0] = b"too short"
    world.tiers.store(some[0], 0)
    with pytest.raises(ValueError):
        world.storers.run()
    assert world.tiers.finished() == [0] and world.tiers.lookup(some) == []
    world.store(some)
    assert world.promote(some) == (HOST, HOST)
    world.host.check()


def test_threads_of_a_real_pool():
    disk = Disk()
    world = World(disk, slots=16)
    loaders, storers = Threads("load", 3, 100), Threads("store", 1, 100)
    tiers = Tiers(
        world.device, world.host, world.disk, loaders, storers, time.monotonic, world.counters, TierOptions(0, 30.0)
    )
    sequences = [blocks(3, seed) for seed in range(4)]
    expected = []
    for n, some in enumerate(sequences):
        for i, block in enumerate(some):
            world.device.blocks[10 * n + i] = payload(block)
            assert tiers.store(block, 10 * n + i)
            expected.append(10 * n + i)
    done: list[int] = []
    until = time.monotonic() + 20
    while len(done) < 12 and time.monotonic() < until:
        done += tiers.finished()
    assert sorted(done) == expected
    promotions = [tiers.promote(some, range(100 * n, 100 * n + 3)) for n, some in enumerate(sequences, 1)]
    while any(p.result() is None for p in promotions) and time.monotonic() < until:
        time.sleep(0.001)
    for n, (promotion, some) in enumerate(zip(promotions, sequences, strict=True), 1):
        assert promotion.result().tiers == (HOST,) * 3
        assert [world.device.blocks[100 * n + i] for i in range(3)] == [payload(block) for block in some]
    assert tiers.close()
    assert not loaders.submit(lambda: None)
    assert World(disk).tiers.lookup(sequences[0]) == [DISK] * 3


def test_a_thread_that_hangs_keeps_nobody():
    gate = threading.Event()
    threads = Threads("hangs", 1, 10)
    assert threads.submit(lambda: gate.wait(20) and None)
    assert not threads.close(0.05)
    gate.set()
    assert threads.close(10)


class Machine(RuleBasedStateMachine):
    """Any order of calls, with restarts, damage and loss: what is served is what a dictionary says, and the counts of a
    lookup are those of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.world = World(self.disk, slots=5, disk_after_hits=1)
        self.ever: set[bytes] = set()

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5)
    tenants = st.sampled_from(["", "a"])

    def chain(self, path: list[int], tenant: str) -> list[BlockId]:
        return sequence([x for x in path for _ in range(4)], tenant)

    @rule(path=tokens, tenant=tenants, run=st.booleans())
    def store(self, path, tenant, run):
        self.world.storers.run()  # the device's blocks are used again
        some = self.chain(path, tenant)
        self.world.store(some, run)
        self.ever.update(block.key for block in some)

    @rule(path=tokens, tenant=tenants)
    def ask(self, path, tenant):
        some = self.chain(path, tenant)
        before = self.world.tiers.counters
        tiers = self.world.tiers.lookup(some)
        after = self.world.tiers.counters
        changes = {name: after[name] - before[name] for name in after}
        assert changes["queries"] == len(some) == changes["host_hit"] + changes["disk_hit"] + changes["miss"]
        assert all(block.key in self.ever for block in some[: len(tiers)])
        loaded = self.world.promote(some[: len(tiers)])
        assert len(loaded) <= len(tiers)

    @rule(count=st.integers(1, 3))
    def work(self, count):
        self.world.storers.run(count)

    @rule(path=tokens, seconds=st.sampled_from([1.0, 1e9]))
    def pin(self, path, seconds):
        self.world.tiers.pin(self.chain(path, "")[-1], seconds)

    @rule()
    def maintain(self):
        self.world.clock.now += 6
        self.world.tiers.maintain()
        self.world.storers.run()

    @rule(flush=st.booleans())
    def restart(self, flush):
        if flush:
            assert self.world.tiers.close()
        else:
            self.world.folder.shut()
        self.world = World(self.disk, slots=5, disk_after_hits=1)
        files = sum(name.endswith((".ktkv", ".tmp")) for name in self.disk.names)
        assert files == len(self.world.disk.entries()), "there is a file that nobody finds"

    @rule(data=st.data())
    def damage(self, data):
        names = sorted(name for name in self.disk.names if name.endswith(".ktkv"))
        if names:
            content = self.disk.data[self.disk.names[data.draw(st.sampled_from(names))]]
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    @invariant()
    def sound(self):
        self.world.host.check()
        self.world.disk.check()
        assert len(self.world.host) <= 5
        assert len(self.disk.names) <= 80


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
