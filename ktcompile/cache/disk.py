"""The disk tier: a folder of records under a budget of bytes, which outlives the process.

What cannot be read, or is not what was asked for, is a miss. One process at a time, the one with the lock, changes the
folder; others read what it publishes. A record is written under a name of its own and renamed, and found from then on.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ktcompile.cache import codec
from ktcompile.cache.block_id import BlockId
from ktcompile.cache.breaker import Breaker
from ktcompile.cache.catalogue import Catalogue
from ktcompile.cache.counters import Counters
from ktcompile.cache.index import Entry, Index
from ktcompile.cache.names import is_bad, record_name
from ktcompile.cache.policy import Policy
from ktcompile.cache.record import Header, RecordError, check_is, checksum, parse, payload_of
from ktcompile.cache.record_files import MOST_BAD, RecordFiles
from ktcompile.cache.scan import Found, entry_of, scan
from ktcompile.cache.vfs import Folder
from ktcompile.log import logger

_READ_FAILURES = 3
# Errors that say nothing of the file.
_PASSING = frozenset({errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBADF})


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """How records are kept.

    width: bytes of an element for the codec, as of `BlockMemory.width`; 0: payloads are stored as they are. min_free:
    bytes that the disk must have left. sync: whether a record's bytes are on the disk before it gets its name. Without,
    one that was published just before a loss of power is likely a miss; what is served is checked in any case.
    """

    width: int = 0
    min_free: int = 1 << 30
    sync: bool = False


class DiskStore:
    """Records of blocks in a folder, chosen by `policy`.

    index: None for none. clock: seconds since 1970. writer: whether this process may change the folder. Any thread may
    call. `find` waits for no file.
    """

    def __init__(
        self,
        folder: Folder,
        index: Callable[[bool], Index] | None,
        policy: Policy[bytes],
        clock: Callable[[], float],
        counters: Counters,
        options: DiskOptions,
    ) -> None:
        self._folder, self._make_index, self._counters, self._options = folder, index, counters, options
        self._known = Catalogue(policy, clock)
        self._files = RecordFiles(folder, options.sync)
        self._changing = threading.Lock()  # of the folder
        self._index: Index | None = None
        self._writes, self._reads = Breaker(clock), Breaker(clock, threshold=_READ_FAILURES)
        self._scanned = self.writer = False
        with self._changing:
            self._open()

    def __len__(self) -> int:
        return len(self._known)

    def has(self, key: bytes) -> bool:
        """Return whether there is a record by a key; nobody asked for it."""
        return self._known.get(key) is not None

    def find(self, block: BlockId) -> bool:
        """Return whether there is a record by a block's key, and say that it was asked for."""
        if not self._known.ask(block.key) or (self._reads.is_open and not self._reads.allows()):
            return False
        return self._known.use(block.key)

    def read(self, block: BlockId, layout: str, out: memoryview) -> bytes | None:
        """Write the payload of a block to `out`, and return its xxh3_128; None: there is none that is whole and just
        this, and `out` may have been written to."""
        entry = self._known.get(block.key)
        if entry is None:
            return None
        name = record_name(block.key)
        try:
            record = self._files.contents(block.key, entry.size)
            header = parse(record)
            check_is(header, block, layout, len(out))
            codec.decode(header.codec, payload_of(header, record), out)
            if checksum(out) != header.raw_sum:
                raise RecordError("codec", "its payload was stored as another")
        except FileNotFoundError:  # the process that writes has given it up
            self._known.cut(block.key)
            return None
        except OSError as error:
            self._failed(self._reads, f"{name} cannot be read", error)
            if error.errno not in _PASSING:
                self._give_up(block.key)
            return None
        except RecordError as error:
            self._counters.add("disk_verify_failed")
            logger.warning("The record %s is not used: %s", name, error)
            self.quarantine(block.key)
            return None
        self._reads.succeeded()
        self._counters.add("disk_bytes_out", len(record))
        return header.raw_sum

    def put(self, block: BlockId, layout: str, payload: memoryview, sum_: bytes) -> bool:
        """Return whether there is a record of a block from now on, as there may have been. sum_: of `payload`."""
        if self._refuses(block):
            return self.has(block.key)
        number, stored = codec.encode(payload, self._options.width)
        header = Header(block, layout, number, len(payload), len(stored), checksum(stored), sum_)
        with self._changing:
            if self._refuses(block) or not self._writes.allows():
                return self.has(block.key)
            entry = entry_of(header, self._known.now())
            try:
                if not self._make_room(entry):
                    return False
                self._files.publish(entry.key, (header.pack(), stored))
                if not self._known.add(entry):
                    self._files.remove([entry.key])
                    return False
            except OSError as error:
                self._known.refuse(entry)
                self._failed(self._writes, f"{record_name(block.key)} cannot be written", error)
                return False
            self._writes.succeeded()
            if self._index is not None:
                self._index.put([entry])
            self._counters.add("disk_stored")
            self._counters.add("disk_bytes_in", entry.size)
            return True

    def pin(self, key: bytes, until: float) -> bool:
        """Keep a record, and those before it, until a time; 0: no longer. False: there is none, or it is not ours."""
        with self._changing:
            entry = self._known.pin(key, until) if self.writer else None
            if entry is None:
                return False
            if self._index is not None:
                self._index.put([entry])
            return True

    def entries(self) -> list[Entry]:
        """Return what is known of all records, parents before children."""
        return self._known.entries()

    def remove(self, key: bytes) -> bool:
        """Remove a record and those behind it. False: there is none, or it is not ours to remove. OSError."""
        with self._changing:
            gone = self._known.cut(key) if self.writer else []
            self._drop(gone)
            return bool(gone)

    def quarantine(self, key: bytes) -> None:
        """Put a record aside, and give up those behind it."""
        with self._changing:
            gone = self._known.cut(key)
            if not gone or not self.writer:
                return
            self._counters.add("disk_quarantined")
            with self._guarded("a damaged record cannot be put aside"):
                self._drop([entry for entry in gone if entry.key != key])
                if self._index is not None:
                    self._index.remove([key])
                self._files.set_aside(record_name(key))

    def forget_quarantine(self) -> None:
        """Remove what is in quarantine. OSError."""
        with self._changing:
            if self.writer:
                self._files.unlink(tuple(name for name, _ in self._folder.files() if is_bad(name)))

    def maintain(self) -> None:
        """Do what is due: removals that failed, the time to live, news of the writer, the index."""
        with self._changing, self._guarded("the folder of the disk tier cannot be kept"):
            if not self._scanned or not self.writer:
                self._open()
            if not self.writer or not self._writes.allows():
                return
            gone = self._known.expire()
            self._counters.add("disk_evicted", len(gone))
            self._drop(gone)
            self._tell_index()

    def close(self) -> None:
        """Give up the folder; what was put stays."""
        with self._changing:
            self._tell_index()
            if self._index is not None:
                self._index.close()
            self._index, self.writer, self._scanned = None, False, False
            self._known.replace(())
            self._folder.shut()

    def check(self) -> None:
        """Assert that what is known of records goes together."""
        self._known.check()

    def _open(self) -> None:
        """Find out what is in the folder, and become its writer if there is none."""
        with self._guarded("the folder of the disk tier cannot be read"):
            was_writer, self.writer = self.writer, self._folder.lock()
            if self._make_index is not None and (self._index is None or was_writer != self.writer):
                if self._index is not None:
                    self._index.close()
                self._index = self._make_index(not self.writer)
            found = scan(self._folder, self._index.entries() if self._index is not None else (), self._known.now())
            gone = self._known.replace(found.entries)
            self._scanned = True
            if self.writer:
                self._tidy(found, gone)

    def _tidy(self, found: Found, gone: list[Entry]) -> None:
        """Remove what nothing will ever read."""
        if self._index is not None:
            kept = {entry.key for entry in found.entries}
            self._index.remove([entry.key for entry in self._index.entries() if entry.key not in kept])
            self._index.put(found.unknown)
        self._counters.add("disk_stale", len(found.lost))
        self._counters.add("disk_evicted", len(gone))
        self._counters.add("disk_quarantined", len(found.damaged))
        self._drop(gone)
        self._files.unlink((*found.unfinished, *found.lost, *found.bad[MOST_BAD:]))
        for name in found.damaged:
            self._files.set_aside(name)

    def _make_room(self, entry: Entry) -> bool:
        """Have the policy know a record that is to be written, and return whether it may be, once those that go for it
        were removed. OSError."""
        fits, gone = self._known.reserve(entry)
        short = self._options.min_free + entry.size - self._folder.free_bytes() if fits else 0
        if short > 0:
            gone += self._known.evict(short, entry)
        self._counters.add("disk_evicted", len(gone))
        self._drop(gone)
        full = short > 0 and self._folder.free_bytes() - entry.size < self._options.min_free
        if fits and not full and self._known.takes(entry):
            return True
        self._known.refuse(entry)
        return False

    def _refuses(self, block: BlockId) -> bool:
        """Return whether a record is there, what it continues is not, or nothing can be written."""
        return not self.writer or not self._scanned or not self._known.takes(block)

    def _give_up(self, key: bytes) -> None:
        """Remove a record that cannot be read, and those behind it."""
        with self._changing:
            gone = self._known.cut(key)
            if self.writer:
                with self._guarded("a record cannot be removed"):
                    self._drop(gone)

    def _drop(self, entries: list[Entry]) -> None:
        """Remove records of which nothing is known any more. OSError."""
        keys = [entry.key for entry in entries]
        if self._index is not None:
            self._index.remove(keys)
        self._files.remove(keys)

    def _tell_index(self) -> None:
        used = self._known.used()
        if self._index is not None:
            self._index.put(used)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed(self._writes, what, error)

    def _failed(self, breaker: Breaker, what: str, error: OSError) -> None:
        self._counters.add("disk_io_error")
        logger.debug("%s: %s", what, error)
        if breaker.failed():
            self._counters.add("disk_breaker_opened")
            logger.warning("The disk tier of the prefix cache is left alone for a while: %s: %s", what, error)
