"""Blocks with known contents, and stores of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ktcompile.cache.block_id import BlockId, chain
from ktcompile.cache.counters import Counters
from ktcompile.cache.disk import DiskOptions, DiskStore
from ktcompile.cache.host import HostStore, arena
from ktcompile.cache.index import Index
from ktcompile.cache.policies import make
from ktcompile.cache.policy import Limits
from ktcompile.cache.record import checksum
from ktcompile.cache.vfs import Folder

SIZE = 64  # bytes of a payload
TOKENS = 4  # of a block
LAYOUT = "a test's"


def root(tenant: str = "") -> bytes:
    return hashlib.sha256(b"root" + tenant.encode()).digest()


def sequence(tokens: list[int], tenant: str = "") -> list[BlockId]:
    """Return the full blocks of a sequence of tokens."""
    keys, parent = [], root(tenant)
    for begin in range(0, len(tokens) - TOKENS + 1, TOKENS):
        parent = hashlib.sha256(parent + repr(tokens[begin : begin + TOKENS]).encode()).digest()
        keys.append(parent)
    return chain(root(tenant), keys, tokens, TOKENS)


def blocks(count: int, seed: int = 0, tenant: str = "") -> list[BlockId]:
    """Return the blocks of a sequence of its own."""
    return sequence([seed * 1000 + i for i in range(count * TOKENS)], tenant)


def payload(block: BlockId, size: int = SIZE) -> bytes:
    """Return what a block holds: bytes that no other one has."""
    part = hashlib.sha256(block.namespace + b"".join(t.to_bytes(4, "little") for t in block.token_ids)).digest()
    part = hashlib.sha256(part + block.key).digest()
    return (part * (size // len(part) + 1))[:size]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def disk_store(
    folder: Folder,
    *,
    capacity: int = 1 << 20,
    index: Callable[[bool], Index] | None = None,
    counters: Counters | None = None,
    clock: Callable[[], float] | None = None,
    ttl: float | None = None,
    quota: int | None = None,
    **options: object,
) -> DiskStore:
    policy = make("lru", Limits(capacity, ttl=ttl, quota=quota))
    options = {"min_free": 0, **options}
    return DiskStore(folder, index, policy, clock or Clock(), counters or Counters(), DiskOptions(**options))


def host_store(slots: int = 8, *, size: int = SIZE, counters: Counters | None = None, **options: object) -> HostStore:
    policy = make("lru", Limits(slots * size))
    return HostStore(arena(slots * size), size, policy, Clock(), counters or Counters(), **options)


def put(store: DiskStore, block: BlockId, size: int = SIZE) -> bool:
    content = payload(block, size)
    return store.put(block, LAYOUT, memoryview(content), checksum(content))


def read(store: DiskStore, block: BlockId, size: int = SIZE) -> bytes | None:
    """Return what a store has of a block. AssertionError: it is not what was put there."""
    out = memoryview(bytearray(size))
    if store.read(block, LAYOUT, out) is None:
        return None
    assert bytes(out) == payload(block, size), f"wrong bytes of {block.key.hex()} were served"
    return bytes(out)
