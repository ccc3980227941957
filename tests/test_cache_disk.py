"""The disk tier: what is served is right or is not served, whatever the files, the disk and other processes do."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cache_blocks import LAYOUT, SIZE, Clock, blocks, disk_store, payload, put, read
from helpers.fault_folder import READS, Crash, Disk, Fault, FaultFolder

from ktcompile.cache.breaker import Breaker
from ktcompile.cache.counters import Counters
from ktcompile.cache.index import FILE, Entry, Index
from ktcompile.cache.names import is_bad, key_of, record_name
from ktcompile.cache.record import Header, checksum
from ktcompile.cache.record_files import MOST_BAD
from ktcompile.cache.vfs import RealFolder

RECORD = Header(blocks(1)[0], LAYOUT, 0, SIZE, SIZE, bytes(16), bytes(16)).record_size


def records(disk: Disk) -> dict[str, bytes]:
    return {name: bytes(disk.data[file]) for name, file in disk.names.items() if key_of(name)}


def assert_no_orphans(disk: Disk, store) -> None:
    """Every byte of the folder belongs to a record that a lookup finds, or to the few in quarantine."""
    known = {record_name(entry.key): entry.size for entry in store.entries()}
    bad = [name for name in disk.names if is_bad(name)]
    assert {n: len(c) for n, c in records(disk).items()} == known
    assert set(disk.names) == {*known, *bad}
    assert len(bad) <= MOST_BAD
    store.check()


def test_what_was_put_is_there_after_a_restart():
    disk, some = Disk(), blocks(5)
    store = disk_store(FaultFolder(disk))
    assert all(put(store, block) for block in some)
    assert all(store.find(block) and read(store, block) for block in some)
    store.close()
    again = disk_store(FaultFolder(disk))
    assert all(again.find(block) and read(again, block) for block in some)
    assert_no_orphans(disk, again)


def test_a_child_is_published_behind_its_parent_alone():
    """Museum 11."""
    store = disk_store(FaultFolder(Disk()))
    some = blocks(3)
    assert not put(store, some[1])
    assert put(store, some[0])
    assert not put(store, some[2])
    assert put(store, some[1])
    assert not store.find(some[2])


def test_a_record_whose_parent_goes_while_it_is_written_is_not_left(monkeypatch):
    folder = FaultFolder(Disk())
    store = disk_store(folder)
    first, second = blocks(2)
    assert put(store, first)
    publish = store._files.publish

    def slow(key, parts):
        publish(key, parts)
        store._known.cut(first.key)  # somebody else has removed its file, and a reader found that out

    monkeypatch.setattr(store._files, "publish", slow)
    assert not put(store, second) and not store.find(second) and len(store) == 0
    assert record_name(second.key) not in dict(folder.files())
    store.check()


def test_the_budget_is_kept_and_the_last_of_a_sequence_goes_first():
    """Museum 8, 14 and 25: the beginning of a sequence stays, the folder never has more bytes than it may, and a block
    that comes costs as many as its place takes."""
    disk, counters = Disk(), Counters()
    store = disk_store(FaultFolder(disk), capacity=4 * RECORD, counters=counters)
    first, second = blocks(4), blocks(2, seed=1)
    assert all(put(store, block) for block in first)
    for i, block in enumerate(second, 1):
        assert put(store, block)
        assert sum(map(len, records(disk).values())) <= 4 * RECORD
        assert [store.find(b) for b in first] == [True] * (4 - i) + [False] * i
    assert counters.snapshot()["disk_evicted"] == 2
    assert_no_orphans(disk, store)


def test_a_pinned_record_and_those_before_it_stay():
    clock = Clock()
    store = disk_store(FaultFolder(Disk()), capacity=3 * RECORD, clock=clock)
    first = blocks(2)
    assert all(put(store, block) for block in first)
    assert store.pin(first[1].key, clock.now + 100)
    for seed in range(1, 5):
        put(store, blocks(1, seed)[0])
    assert all(read(store, block) for block in first)
    clock.now += 200
    store.maintain()
    for seed in range(5, 9):
        put(store, blocks(1, seed)[0])
    assert not store.find(first[1])


def test_a_record_that_nobody_used_for_its_time_to_live_goes():
    clock, disk = Clock(), Disk()
    store = disk_store(FaultFolder(disk), clock=clock, ttl=10)
    some = blocks(2)
    assert all(put(store, block) for block in some)
    clock.now += 8
    store.find(some[0])
    clock.now += 4
    store.maintain()
    assert store.find(some[0]) and not store.find(some[1])
    assert_no_orphans(disk, store)


def test_a_tenant_has_no_more_than_its_quota_and_none_of_anothers_blocks():
    disk = Disk()
    store = disk_store(FaultFolder(disk), quota=2 * RECORD)
    ours, theirs = blocks(2, tenant="a"), blocks(2, tenant="b")
    assert [block.token_ids for block in ours] == [block.token_ids for block in theirs]
    assert all(put(store, block) for block in ours)
    assert not any(store.find(block) for block in theirs)
    assert all(put(store, block) for block in theirs)
    put(store, blocks(1, 5, "a")[0])
    assert all(read(store, block) for block in theirs)
    assert sum(entry.size for entry in store.entries() if entry.namespace == ours[0].namespace) <= 2 * RECORD
    mixed = replace(theirs[0], key=ours[0].key)
    assert read(store, mixed) is None  # a key that was guessed is none of the tenant's


def spoil(record: bytes, how: str) -> bytes:
    other = blocks(1, seed=9)[0]
    stranger = Header(other, LAYOUT, 0, SIZE, SIZE, checksum(payload(other)), checksum(payload(other))).pack()
    return {
        "empty": b"",
        "torn": record[: len(record) // 2],
        "one byte less": record[:-1],
        "longer": record + b"\0",
        "zeros": bytes(len(record)),
        "misdirected": stranger + payload(other),
        "another version": record[:8] + struct.pack("<H", 99) + record[10:],
        "payload of another": record[:-SIZE] + payload(other),
    }[how]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    "how",
    ["empty", "torn", "one byte less", "longer", "zeros", "misdirected", "another version", "payload of another"],
)
def test_a_record_that_is_not_whole_or_not_the_one_is_a_miss(how, restarted):
    """Museum 4, 6, 7, 18 and 23."""
    disk, counters = Disk(), Counters()
    some = blocks(3)
    store = disk_store(FaultFolder(disk), counters=counters)
    assert all(put(store, block) for block in some)
    file = disk.names[record_name(some[1].key)]
    disk.data[file] = bytearray(spoil(bytes(disk.data[file]), how))
    if restarted:
        store = disk_store(FaultFolder(disk), counters=counters)
    assert read(store, some[1]) is None
    assert read(store, some[0]) is not None
    assert not store.find(some[2]), "behind a hole nothing is found"
    assert_no_orphans(disk, store)
    assert put(store, some[1]) and read(store, some[1])
    seen = counters.snapshot()
    assert seen["disk_quarantined"] + seen["disk_stale"] > 0


def test_each_flipped_bit_of_a_record_is_a_miss():
    disk, block = Disk(), blocks(1)[0]
    put(disk_store(FaultFolder(disk)), block)
    record = records(disk)[record_name(block.key)]
    for bit in range(8 * len(record)):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        one = Disk({1: flipped}, {}, {record_name(block.key): 1}, {}, next_file=2)
        assert read(disk_store(FaultFolder(one)), block) is None, f"bit {bit}"


def test_swapped_records_are_misses():
    disk = Disk()
    a, b = blocks(1)[0], blocks(1, seed=1)[0]
    store = disk_store(FaultFolder(disk))
    assert put(store, a) and put(store, b)
    names = disk.names
    names[record_name(a.key)], names[record_name(b.key)] = names[record_name(b.key)], names[record_name(a.key)]
    assert read(store, a) is None and read(store, b) is None
    assert not store.entries()


def test_an_equal_key_of_other_tokens_is_a_miss():
    """Museum 1 and 2: a key finds a block and proves nothing."""
    block = blocks(1)[0]
    store = disk_store(FaultFolder(Disk()))
    assert put(store, block)
    other = replace(block, token_ids=(9, 9, 9, 9))
    assert read(store, other) is None
    assert store.read(block, "another layout", memoryview(bytearray(SIZE))) is None


def test_quarantine_keeps_a_few_records_alone():
    disk = Disk()
    store = disk_store(FaultFolder(disk))
    some = [blocks(1, seed)[0] for seed in range(MOST_BAD + 3)]
    for block in some:
        assert put(store, block)
        disk.data[disk.names[record_name(block.key)]][-1] ^= 1
        assert read(store, block) is None
    assert sum(map(is_bad, disk.names)) == MOST_BAD
    assert_no_orphans(disk, store)


def scenario(disk: Disk, fault: Fault | None, sync: bool) -> None:
    """What happens in a life of the store: stores, hits, evictions, a damaged record, a restart."""
    for life in range(2):
        store = disk_store(FaultFolder(disk, fault), capacity=4 * RECORD, sync=sync)
        for seed in range(3):
            for block in blocks(3, seed + life):
                put(store, block)
                if store.find(block):
                    read(store, block)
        if records(disk):
            name = sorted(records(disk))[0]
            disk.data[disk.names[name]][-1] ^= 1
        for seed in range(4):
            for block in blocks(3, seed):
                read(store, block)
        store.maintain()
        store.check()
        store.close()


@pytest.mark.parametrize(
    ("kind", "of", "sticky"),
    [
        (errno.EIO, None, False),
        (errno.EIO, None, True),
        (errno.ENOSPC, None, True),
        (errno.EROFS, None, True),
        (errno.EINTR, None, False),
        ("after", None, False),
        ("short", ("read",), True),
        ("nothing", ("read",), False),
        ("flip", ("read",), False),
        ("short", ("write",), True),
        ("nothing", ("write",), False),
    ],
)
def test_the_nth_operation_may_fail(kind, of, sticky):
    """For n = 1, 2, 3 ... until none fails: no wrong byte is served, nothing is raised, and after a restart there is no
    byte that is not found. Museum 3, 5, 6 and 20."""
    for n in itertools.count(1):
        disk, fault = Disk(), Fault(n, kind, of, sticky)
        scenario(disk, fault, sync=True)
        assert sum(map(len, records(disk).values())) <= 5 * RECORD or fault.fired
        store = disk_store(FaultFolder(disk), capacity=4 * RECORD)
        assert_no_orphans(disk, store)
        for seed in range(4):
            for block in blocks(3, seed):
                read(store, block)
        assert_no_orphans(disk, store)
        assert put(store, blocks(1, 50)[0])  # it goes on
        if not fault.fired:
            break
    assert n > (5 if of else 50)


@pytest.mark.parametrize("sync", [False, True])
def test_after_a_crash_at_the_nth_operation_each_state_of_the_disk_is_sound(sync):
    """Names up to any change, and bytes that were not synced whole, lost, torn or zeroed. Museum 24."""
    states = 0
    for n in itertools.count(1):
        disk, fault = Disk(), Fault(n, "crash")
        with suppress(Crash):
            scenario(disk, fault, sync)
        done = not fault.fired
        seen = set()
        for state in disk.crash_states():
            shape = tuple(sorted((name.split(".")[0], bytes(state.data[f])) for name, f in state.names.items()))
            if shape in seen:
                continue
            seen.add(shape)
            states += 1
            counters = Counters()
            store = disk_store(FaultFolder(state), capacity=4 * RECORD, counters=counters)
            assert_no_orphans(state, store)
            for seed in range(4):
                for block in blocks(3, seed):
                    read(store, block)
            assert_no_orphans(state, store)
        if done:
            break
        if not sync and n > 40:
            break  # the log of names only grows
    assert states > 100


def test_a_record_that_was_synced_outlasts_each_crash():
    """Museum 7."""
    disk, block = Disk(), blocks(1)[0]
    assert put(disk_store(FaultFolder(disk), sync=True), block)
    for state in disk.crash_states():
        assert read(disk_store(FaultFolder(state)), block)


def test_a_full_disk_opens_the_breaker_which_tries_again():
    disk, counters, clock = Disk(), Counters(), Clock()
    folder = FaultFolder(disk)
    store = disk_store(folder, counters=counters, clock=clock)
    assert put(store, blocks(1)[0])
    folder.fault = Fault(1, errno.ENOSPC, ("write",), sticky=True)
    for seed in range(1, 20):
        assert not put(store, blocks(1, seed)[0])
    assert counters.snapshot()["disk_breaker_opened"] == 1
    assert counters.snapshot()["disk_io_error"] < 5
    assert read(store, blocks(1)[0])
    folder.fault = None
    clock.now += 1000
    assert put(store, blocks(1, 30)[0])
    assert_no_orphans(disk, store)


def test_records_make_way_for_what_the_disk_must_have_left():
    disk = Disk(free=10 * RECORD)
    store = disk_store(FaultFolder(disk), min_free=7 * RECORD)
    for seed in range(6):
        assert put(store, blocks(1, seed)[0])
        assert disk.free >= 7 * RECORD
    assert len(store) == 3
    disk.free = 0  # others filled it
    assert not put(store, blocks(1, 9)[0])


def test_what_fails_again_and_again_is_not_asked_for_a_while():
    disk, counters, clock = Disk(), Counters(), Clock()
    some = [blocks(1, seed)[0] for seed in range(8)]
    store = disk_store(FaultFolder(disk, Fault(1, errno.EINTR, ("read",), sticky=True)), counters=counters, clock=clock)
    assert all(put(store, block) for block in some)
    found = 0
    for block in some:
        if store.find(block):
            found += 1
            assert read(store, block) is None
    assert found == 3
    store._folder.fault = None
    clock.now += 1000
    assert store.find(some[0]) and read(store, some[0])
    assert all(store.find(block) for block in some)


def test_a_breaker_waits_longer_after_each_trial_that_fails():
    clock = Clock()
    breaker = Breaker(clock, threshold=2, pause=1, longest=3)
    assert not breaker.failed() and breaker.allows()
    assert breaker.failed() and not breaker.allows()
    for pause in (2, 3, 3):
        clock.now += pause
        assert breaker.allows() and not breaker.allows()
        assert not breaker.failed()
    breaker.succeeded()
    assert breaker.allows() and breaker.allows() and not breaker.is_open


def test_a_second_process_reads_and_takes_over(tmp_path):
    some = blocks(3)
    writer = disk_store(RealFolder(tmp_path / "kv"), index=lambda read_only: Index(tmp_path / "kv", read_only))
    reader = disk_store(RealFolder(tmp_path / "kv"), index=lambda read_only: Index(tmp_path / "kv", read_only))
    assert writer.writer and not reader.writer
    assert all(put(writer, block) for block in some)
    assert not put(reader, blocks(1, 1)[0])
    reader.maintain()
    assert all(reader.find(block) and read(reader, block) for block in some)
    writer.remove(some[2].key)
    assert read(reader, some[2]) is None
    writer.close()
    reader.maintain()
    assert reader.writer and put(reader, blocks(1, 1)[0])
    reader.close()


def test_files_and_folder_are_the_users_own(tmp_path):
    folder = tmp_path / "kv"
    store = disk_store(RealFolder(folder))
    assert put(store, blocks(1)[0])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
    store.close()


def test_a_folder_that_others_may_write_to_or_a_link_is_refused(tmp_path):
    open_to_all = tmp_path / "all"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match="other users may write"):
        RealFolder(open_to_all)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError):
        RealFolder(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 12345, 12345)
    with pytest.raises(PermissionError, match="another user"):
        RealFolder(theirs)


@pytest.mark.parametrize("kind", ["link", "pipe", "open to all", "folder"])
def test_a_record_that_is_not_a_file_of_the_users_own_is_a_miss(tmp_path, kind):
    folder, block = tmp_path / "kv", blocks(1)[0]
    store = disk_store(RealFolder(folder))
    assert put(store, block)
    path = folder / record_name(block.key)
    saved = tmp_path / "saved"
    saved.write_bytes(path.read_bytes())
    if kind == "open to all":
        path.chmod(0o666)
    else:
        path.unlink()
        {"link": lambda: path.symlink_to(saved), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    assert read(store, block) is None
    assert not store.find(block)
    assert saved.exists()
    store.close()


class TestIndex:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return tmp_path / "kv"

    def store(self, folder: Path, **options):
        return disk_store(RealFolder(folder), index=lambda read_only: Index(folder, read_only), **options)

    def test_a_start_reads_no_record_that_it_knows(self, folder, monkeypatch):
        store = self.store(folder)
        some = blocks(4)
        assert all(put(store, block) for block in some)
        assert store.pin(some[2].key, float("inf"))
        store.close()
        monkeypatch.setattr("ktcompile.cache.scan.read_header", lambda *args: pytest.fail("a record was read"))
        again = self.store(folder, capacity=3 * RECORD)
        assert [again.find(block) for block in some] == [True, True, True, False]
        assert [entry.pinned for entry in again.entries()] == [0, 0, float("inf")]
        again.close()

    @pytest.mark.parametrize("damage", ["deleted", "no database", "cut", "of another time", "a link"])
    def test_without_it_the_records_say_all(self, folder, damage, tmp_path):
        store = self.store(folder)
        some = blocks(4)
        assert all(put(store, block) for block in some[:2])
        store.close()
        path = folder / FILE
        old = path.read_bytes()
        store = self.store(folder)
        assert all(put(store, block) for block in some)
        store.remove(some[3].key)
        store.close()
        if damage in ("deleted", "a link"):
            path.unlink()
        if damage == "a link":
            (tmp_path / "elsewhere").write_bytes(old)
            path.symlink_to(tmp_path / "elsewhere")
        if damage == "no database":
            path.write_bytes(b"nothing of the kind" * 500)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:5000])
        if damage == "of another time":
            path.write_bytes(old)
        again = self.store(folder)
        assert [again.find(block) and read(again, block) is not None for block in some] == [True, True, True, False]
        assert put(again, some[3])
        again.close()
        assert len(Index(folder).entries()) == 4

    def test_rows_that_cannot_be_are_no_rows(self, folder):
        folder.mkdir(mode=0o700)
        index = Index(folder)
        good = Entry(bytes(32), bytes(32), bytes(32), 0, 4, 100, 64, 1.0, 1.0)
        index.put([good, Entry(b"short", bytes(32), bytes(32), 0, 4, 100, 64, 1.0, 1.0)])
        index.put([Entry(bytes(31) + b"1", bytes(32), bytes(32), -4, 4, 100, 64, 1.0, 1.0)])
        index.put([Entry(bytes(31) + b"2", bytes(32), bytes(32), "4", 4, 100, 64, 1.0, 1.0)])
        assert index.entries() == [good]

    def test_what_it_says_wrongly_of_a_record_is_found_out(self, folder):
        store = self.store(folder)
        some = blocks(2)
        assert all(put(store, block) for block in some)
        store.close()
        index = Index(folder)
        (first, second) = sorted(index.entries(), key=lambda entry: entry.position)
        second.parent, second.position = bytes(32), 0
        first.size += 7
        index.put([first, second])
        index.close()
        again = self.store(folder)
        assert all(again.find(block) and read(again, block) for block in some)
        again.close()


def test_reads_are_the_operations_that_change_nothing():
    folder = FaultFolder(Disk())
    store = disk_store(folder)
    assert put(store, blocks(1)[0])
    folder.operations.clear()
    read(store, blocks(1)[0])
    assert set(folder.operations) <= {*READS, "close"}
