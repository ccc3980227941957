"""A folder in memory that fails where it is told to, and the states that a crash may leave it in."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

READS = ("files", "open", "size", "read", "free_bytes")


class Crash(BaseException):
    """The process ends at this operation."""


@dataclass
class Disk:
    """Files and names as programs see them, and what of it would outlast a loss of power.

    data: bytes by file. synced: how many of them are on the disk for sure. names: file by name. log: changes of names
    that may not be on the disk yet, oldest first; lasting: names before these. free: bytes that are left.
    """

    data: dict[int, bytearray] = field(default_factory=dict)
    synced: dict[int, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    lasting: dict[str, int] = field(default_factory=dict)
    log: list[Callable[[dict[str, int]], object]] = field(default_factory=list)
    free: int = 1 << 40
    next_file: int = 1

    def change(self, step: Callable[[dict[str, int]], object]) -> None:
        step(self.names)
        self.log.append(step)

    def crash_states(self) -> Iterator[Disk]:
        """Yield what may be there after a loss of power: names up to any change, in their order, and of bytes that were
        not synced all, none, a half, or as many zeros."""
        for count in range(len(self.log) + 1):
            names = dict(self.lasting)
            for step in self.log[:count]:
                step(names)
            for loss in (whole, lost, torn, zeroed):
                data = {file: loss(self.data[file], self.synced.get(file, 0)) for file in set(names.values())}
                synced = {file: len(content) for file, content in data.items()}
                yield Disk(data, synced, names, dict(names), [], self.free, self.next_file)


def whole(content: bytearray, synced: int) -> bytearray:
    return bytearray(content)


def lost(content: bytearray, synced: int) -> bytearray:
    return bytearray(content[:synced])


def torn(content: bytearray, synced: int) -> bytearray:
    return bytearray(content[: synced + (len(content) - synced) // 2])


def zeroed(content: bytearray, synced: int) -> bytearray:
    return bytearray(content[:synced] + bytes(len(content) - synced))


@dataclass
class Fault:
    """What goes wrong at operation `at`, counted from 1 over all that `of` names (None: all of them).

    kind: an errno, "crash", "short" (a read or write does less than it was asked for), "nothing" (it does nothing and
    says so), "after" (it is done, and then says that it failed), or "flip" (a bit that was read is wrong). sticky: so
    do all later ones.
    """

    at: int
    kind: int | str
    of: tuple[str, ...] | None = None
    sticky: bool = False
    seen: int = 0
    fired: int = 0

    def strikes(self, operation: str) -> bool:
        if self.of is not None and operation not in self.of:
            return False
        self.seen += 1
        hit = self.seen == self.at or (self.sticky and self.seen > self.at)
        self.fired += hit
        return hit


class FaultFolder:
    """A `Folder` over a `Disk`. locked: whether another process has its lock."""

    def __init__(self, disk: Disk, fault: Fault | None = None, locked: bool = False) -> None:
        self.disk, self.fault, self._locked = disk, fault, locked
        self._open: dict[int, int] = {}
        self._numbers = itertools.count(100)
        self.operations: list[str] = []

    def _do(self, operation: str, action: Callable[[], object]) -> object:
        self.operations.append(operation)
        if self.fault is None or not self.fault.strikes(operation):
            return action()
        kind = self.fault.kind
        if kind == "crash":
            raise Crash
        if kind == "after":
            action()
            raise OSError(errno.EIO, "it was done all the same")
        if isinstance(kind, int):
            raise OSError(kind, os.strerror(kind))
        result = action()
        if operation == "read" and isinstance(result, bytes) and result:
            if kind == "short":
                return result[: len(result) // 2]
            if kind == "nothing":
                return b""
            if kind == "flip":
                wrong = bytearray(result)
                wrong[len(wrong) // 2] ^= 4
                return bytes(wrong)
        return result

    def files(self) -> list[tuple[str, int]]:
        return self._do("files", lambda: [(n, len(self.disk.data[f])) for n, f in self.disk.names.items()])

    def create(self, name: str) -> int:
        return self._do("create", lambda: self._create(name))

    def _create(self, name: str) -> int:
        if name in self.disk.names:
            raise FileExistsError(errno.EEXIST, name)
        file, self.disk.next_file = self.disk.next_file, self.disk.next_file + 1
        self.disk.data[file] = bytearray()
        self.disk.change(lambda names: names.__setitem__(name, file))
        return self._opened(file)

    def open(self, name: str) -> int:
        return self._do("open", lambda: self._opened(self._file(name)))

    def _file(self, name: str) -> int:
        if name not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, name)
        return self.disk.names[name]

    def _opened(self, file: int) -> int:
        number = next(self._numbers)
        self._open[number] = file
        return number

    def size(self, file: int) -> int:
        return self._do("size", lambda: len(self.disk.data[self._open[file]]))

    def read(self, file: int, size: int, offset: int) -> bytes:
        return self._do("read", lambda: bytes(self.disk.data[self._open[file]][offset : offset + size]))

    def write(self, file: int, data: memoryview) -> int:
        struck = self.fault is not None and self.fault.kind in ("short", "nothing")
        before = self.fault.fired if self.fault else 0
        self._do("write", lambda: None)
        if struck and self.fault is not None and self.fault.fired > before:
            data = data[: len(data) // 2] if self.fault.kind == "short" else data[:0]
        if len(data) > self.disk.free:
            raise OSError(errno.ENOSPC, "full")
        self.disk.data[self._open[file]] += data
        self.disk.free -= len(data)
        return len(data)

    def sync(self, file: int) -> None:
        def action() -> None:
            self.disk.synced[self._open[file]] = len(self.disk.data[self._open[file]])

        self._do("sync", action)

    def close(self, file: int) -> None:
        self._do("close", lambda: self._open.pop(file))

    def rename(self, name: str, to: str) -> None:
        file = self._file(name)

        def step(names: dict[str, int]) -> None:
            names.pop(name, None)
            names[to] = file

        self._do("rename", lambda: self.disk.change(step))

    def unlink(self, name: str) -> None:
        def action() -> None:
            file = self._file(name)
            self.disk.change(lambda names: names.pop(name, None))
            self.disk.free += len(self.disk.data[file])

        self._do("unlink", action)

    def sync_names(self) -> None:
        def action() -> None:
            self.disk.lasting, self.disk.log = dict(self.disk.names), []

        self._do("sync_names", action)

    def free_bytes(self) -> int:
        return self._do("free_bytes", lambda: self.disk.free)

    def lock(self) -> bool:
        return not self._locked

    def shut(self) -> None:
        self._open.clear()
