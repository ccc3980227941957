"""A disk tier as the command line looks at it: what is in the folder, and whether it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ktcompile.cache.codec import decode
from ktcompile.cache.counters import Counters
from ktcompile.cache.disk import DiskOptions, DiskStore
from ktcompile.cache.index import Entry, Index
from ktcompile.cache.names import is_bad, is_unfinished, record_name
from ktcompile.cache.policies import make
from ktcompile.cache.policy import Limits
from ktcompile.cache.record import Header, RecordError, checksum, parse, payload_of
from ktcompile.cache.record_files import RecordFiles
from ktcompile.cache.vfs import RealFolder, read_up_to
from ktcompile.owned_folder import caches_folder

_ANY_SIZE = 1 << 62
# More than a block has; what is damaged asks for no more memory.
_MOST_RAW = 1 << 30


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that is not as it should be. kind: "damaged", "unfinished" or "in quarantine"."""

    name: str
    kind: str
    what: str


def default_folder() -> Path:
    """Return where the disk tier is where nobody says otherwise."""
    return caches_folder() / "kv"


@contextmanager
def opened(path: Path, writing: bool, width: int = 0) -> Iterator[DiskStore]:
    """Give the store of a folder, in which nothing is given up for its size.

    writing: what is left of unfinished records is removed. width: of `DiskOptions`. FileNotFoundError: there is none.
    ValueError: it is not the user's own, or another process writes to it.
    """
    folder = _folder(path, writing)
    policy = make("lru", Limits(_ANY_SIZE))
    options = DiskOptions(width, min_free=0)
    store = DiskStore(folder, lambda only: Index(path, only), policy, time.time, Counters(), options)
    try:
        if writing and not store.writer:
            raise ValueError(f"another process writes to the cache in {path}; ask again when it has ended")
        yield store
    finally:
        store.close()


def problems(path: Path, payloads: bool) -> list[Problem]:
    """Return what is wrong in a folder; nothing is changed. payloads: whether all bytes are read. OSError."""
    folder = _folder(path, writing=False)
    found = []
    try:
        for name, size in sorted(folder.files()):
            if is_unfinished(name):
                found.append(Problem(name, "unfinished", f"{size} bytes that were never published"))
            elif is_bad(name):
                found.append(Problem(name, "in quarantine", f"{size} bytes that were found to be damaged"))
        with opened(path, writing=False) as store:
            keys = {record_name(entry.key): entry for entry in store.entries()}
        for name, size in sorted(folder.files()):
            if name.endswith(".ktkv"):
                entry = keys.get(name)
                what = "nothing leads to it, or its header is damaged" if entry is None else None
                if entry is not None and payloads:
                    what = damage(folder, entry, size)
                if what:
                    found.append(Problem(name, "damaged", what))
    finally:
        folder.shut()
    return found


def damage(folder: RealFolder, entry: Entry, size: int) -> str | None:
    """Return what is wrong with a record, all of which is read; None: nothing."""
    try:
        record = RecordFiles(folder, sync=False).contents(entry.key, size)
        checked(record)
    except (OSError, RecordError) as error:
        return str(error)
    return None


def checked(record: bytes | memoryview) -> tuple[Header, bytearray]:
    """Return a whole record's header and its raw payload. RecordError: something of it is damaged."""
    header = parse(record)
    payload = payload_of(header, record)
    if header.raw_size > _MOST_RAW:
        raise RecordError("lengths", f"{len(payload)} bytes would become {header.raw_size}")
    raw = bytearray(header.raw_size)
    decode(header.codec, payload, memoryview(raw))
    if checksum(raw) != header.raw_sum:
        raise RecordError("codec", "its payload was stored as another")
    return header, raw


def export(path: Path, to: Path, chosen: Callable[[Entry], bool]) -> int:
    """Write records, one behind the other, to a new file, and return how many. FileExistsError, OSError."""
    count = 0
    folder = _folder(path, writing=False)
    try:
        with opened(path, writing=False) as store, to.open("xb") as file:
            for entry in filter(chosen, store.entries()):
                opened_file = folder.open(record_name(entry.key))
                try:
                    record = read_up_to(folder, opened_file, entry.size)
                finally:
                    folder.close(opened_file)
                checked(record)
                file.write(record)
                count += 1
    finally:
        folder.shut()
    return count


def import_(path: Path, source: Path) -> tuple[int, int]:
    """Put the records of a file into the store of a folder, which is made where it is missing; return how many of them
    are there now, and how many were in the file.

    ValueError: a record of the file is damaged (those before it are in), or as for `opened`.
    """
    rest = memoryview(source.read_bytes())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    stored = count = 0
    with opened(path, writing=True, width=parse(rest).codec) as store:
        while rest:
            size = parse(rest).record_size
            header, raw = checked(rest[:size])
            stored += store.put(header.block, header.layout, memoryview(raw), header.raw_sum)
            count += 1
            rest = rest[size:]
    return stored, count


def _folder(path: Path, writing: bool) -> RealFolder:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no cache of keys and values in {path}")
    try:
        return RealFolder(path) if writing else _ReadOnly(path)
    except OSError as error:
        raise ValueError(f"the cache in {path} is not used: {error}") from error


class _ReadOnly(RealFolder):
    """A folder that is looked at and never changed."""

    def lock(self) -> bool:
        return False
