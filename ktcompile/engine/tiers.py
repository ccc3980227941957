"""The tiers behind an engine's device: what options make of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from ktcompile.cache.block_id import KEY_SIZE
from ktcompile.cache.counters import Counters
from ktcompile.cache.disk import DiskOptions, DiskStore
from ktcompile.cache.host import HostStore, arena
from ktcompile.cache.index import Index
from ktcompile.cache.policies import NAMES, make
from ktcompile.cache.policy import Limits
from ktcompile.cache.tiers import TierOptions, Tiers
from ktcompile.cache.transfer import BlockMemory
from ktcompile.cache.vfs import Folder, RealFolder, read_up_to, write_all
from ktcompile.cache.workers import Threads
from ktcompile.engine.options import EngineOptions

# Of the device's bytes, those of the host where only a disk is asked for.
_HOST_SHARE = 4
_DISK_SIZE = 16 << 30
# Jobs that may wait. Who asks for stores bounds them too (`scheduler.behind`).
_LOADS, _STORES = 4096, 512
_SECRET = "secret"


@dataclass(frozen=True, slots=True)
class Opened:
    """Tiers, and the secret that keys of salted blocks are made with, which lives as long as these blocks do."""

    tiers: Tiers
    secret: bytes


def open_tiers(
    options: EngineOptions, memory: BlockMemory, device_bytes: int, clock: Callable[[], float]
) -> Opened | None:
    """Return the tiers that options ask for, None: they ask for none.

    device_bytes: of keys and values on the device. ValueError: the folder cannot be used.
    """
    path = options.kv_disk_path
    host_bytes = options.kv_host_memory
    if host_bytes is None:
        host_bytes = 0 if path is None else device_bytes // _HOST_SHARE
    slots = host_bytes // memory.block_bytes
    if not options.enable_prefix_caching or (path is None and not slots):
        return None
    counters = Counters()
    host_policy = make(NAMES[0], Limits(max(1, slots * memory.block_bytes)))
    host = HostStore(arena(slots * memory.block_bytes), memory.block_bytes, host_policy, clock, counters)
    disk, secret = None, secrets.token_bytes(KEY_SIZE)
    if path is not None:
        path = path.expanduser().absolute()
        try:
            folder = RealFolder(path)
            secret = _secret(folder)
        except OSError as error:
            raise ValueError(f"kv_disk_path is {path}, which cannot be used: {error}") from error
        policy = make(NAMES[0], Limits(_DISK_SIZE if options.kv_disk_size is None else options.kv_disk_size))
        of_disk = DiskOptions(width=memory.width)
        disk = DiskStore(folder, lambda only: Index(path, only), policy, time.time, counters, of_disk)
    # Without a host nothing is known to be used again, and nothing would be there to be written at the end.
    of_tiers = TierOptions(disk_after_hits=1 if slots else 0)
    loaders, storers = Threads("ktcompile-kv-load", 2, _LOADS), Threads("ktcompile-kv-store", 1, _STORES)
    return Opened(Tiers(memory, host, disk, loaders, storers, clock, counters, of_tiers), secret)


def _secret(folder: Folder) -> bytes:
    """Return the secret of a folder, which is made with it. Where it is not whole another one is used: what it was the
    key to is not found again."""
    secret = secrets.token_bytes(KEY_SIZE)
    try:
        file = folder.create(_SECRET)
    except FileExistsError:
        file = folder.open(_SECRET)
        try:
            found = read_up_to(folder, file, KEY_SIZE)
        finally:
            folder.close(file)
        return found if len(found) == KEY_SIZE else secret
    try:
        write_all(folder, file, secret)
    finally:
        folder.close(file)
    return secret
