"""Kills processes that publish records, and looks at what they leave. Imports no torch, so that forks are cheap."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

from helpers.cache_blocks import blocks, disk_store, payload, put, read
from ktcompile.cache.counters import Counters
from ktcompile.cache.index import FILE, Index
from ktcompile.cache.names import is_bad, record_name
from ktcompile.cache.vfs import RealFolder

SIZE = 20_000
CAPACITY = 40 * 21_000
SEQUENCES = 60


def run(folder: Path, kills: int, seed: int) -> int:
    """Return how many blocks were found after `kills` kills. AssertionError: one was wrong, or a file was left."""
    generator = random.Random(seed)
    found = 0
    for cycle in range(kills):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            _publish(folder, generator.randrange(SEQUENCES), tell)
        os.close(tell)
        assert os.read(ready, 1) == b"r", "the process that publishes has failed"
        os.close(ready)
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found += _look(folder, cycle, f"cycle {cycle} of seed {seed}")
    return found


def _publish(folder: Path, begin: int, tell: int) -> None:
    try:
        store = disk_store(RealFolder(folder), capacity=CAPACITY, index=lambda only: Index(folder, only), width=1)
        os.write(tell, b"r")
        for number in itertools.count(begin):
            for block in blocks(3, number % SEQUENCES):
                put(store, block, SIZE)
                read(store, block, SIZE)
            store.maintain()
    finally:
        os._exit(1)


def _look(folder: Path, cycle: int, when: str) -> int:
    counters = Counters()
    # At times without the index, so that all records are read.
    index = (lambda only: Index(folder, only)) if cycle % 3 else None
    store = disk_store(RealFolder(folder), capacity=CAPACITY, counters=counters, index=index, width=1)
    assert store.writer, f"the lock has outlived its process: {when}"
    found = 0
    for number in range(SEQUENCES):
        for block in blocks(3, number):
            if store.find(block):
                found += 1
                assert read(store, block, SIZE) == payload(block, SIZE), when
    store.check()
    known = {record_name(entry.key) for entry in store.entries()}
    names = {path.name for path in folder.iterdir() if path.name != "lock" and not path.name.startswith(FILE)}
    assert {name for name in names if not is_bad(name)} == known, f"files are left: {when}"
    assert sum(entry.size for entry in store.entries()) <= CAPACITY
    # A kill loses no bytes of a file that has its name; a loss of power would.
    assert counters.snapshot()["disk_verify_failed"] == counters.snapshot()["disk_quarantined"] == 0, when
    store.close()
    return found
