"""The file of a packed model.

A block of 4096 bytes (magic, version, where the header is, the file's size, checksums), payloads at whole pages, and at
the end the header: JSON that says what each payload is, with the xxh3_128 of each. Plain tensors come before
experts, so that they can be mapped by themselves. Numbers are little-endian.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ktcompile.ops.threads import get_num_threads

VERSION = 1
_MAGIC = b"KTPACKED"
# Magic, version, offset of the header, its length, size of the file; then the header's xxh3_128.
_FRONT = struct.Struct("<8sIQQQ16s")
_BLOCK = 4096
_CHECKSUM = 16
# Larger payloads begin at a huge page, for systems that map files by those.
_HUGE_PAGE = 1 << 21
_LONGEST_HEADER = 1 << 28


class PackedFileError(ValueError):
    """A file of a packed model cannot be used; the message says why, not which file."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes [offset, offset + size) of a file, and their xxh3_128 in hexadecimal digits. size: may be 0."""

    offset: int
    size: int
    checksum: str

    def record(self) -> list[Any]:
        """Return it as JSON has it."""
        return [self.offset, self.size, self.checksum]


class PackedFileWriter:
    """Writes an open, empty file. size: bytes so far."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.size = descriptor, _BLOCK

    def add(self, memory: memoryview) -> Payload:
        """Write a payload. OSError."""
        alignment = _HUGE_PAGE if len(memory) >= _HUGE_PAGE else _BLOCK
        begin = -(-self.size // alignment) * alignment
        self._write(memory, begin)
        self.size = begin + len(memory)
        return Payload(begin, len(memory), xxhash.xxh3_128_hexdigest(memory))

    def finish(self, header: dict[str, Any]) -> None:
        """Write the header, after which the file is whole. OSError."""
        text = json.dumps(header).encode()
        payload = self.add(memoryview(text))
        self.size = -(-self.size // _BLOCK) * _BLOCK
        os.ftruncate(self._descriptor, self.size)
        checksum = bytes.fromhex(payload.checksum)
        front = _FRONT.pack(_MAGIC, VERSION, payload.offset, payload.size, self.size, checksum)
        front = front.ljust(_BLOCK - _CHECKSUM, b"\0")
        self._write(memoryview(front + xxhash.xxh3_128_digest(front)), 0)

    def _write(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            done += os.pwrite(self._descriptor, memory[done:], offset + done)


class PackedFile:
    """An open file of a packed model. header: what its writer gave to `finish`. size: in bytes."""

    def __init__(self, descriptor: int, path: Path) -> None:
        """Read the header. descriptor: is closed with the file. PackedFileError: the file is damaged, or of another
        version. OSError."""
        self.path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size
        front = os.pread(descriptor, _BLOCK, 0)
        if len(front) < _BLOCK or not front.startswith(_MAGIC):
            raise PackedFileError("it does not begin as one")
        _, version, offset, length, size, checksum = _FRONT.unpack_from(front)
        if version != VERSION:
            raise PackedFileError(f"it has version {version} of the format, this is {VERSION}")
        if xxhash.xxh3_128_digest(front[:-_CHECKSUM]) != front[-_CHECKSUM:]:
            raise PackedFileError("its first block is damaged")
        if size != self.size:
            raise PackedFileError(f"it has {self.size} bytes of {size}")
        text = os.pread(descriptor, length, offset) if length <= _LONGEST_HEADER else b""
        if len(text) != length or xxhash.xxh3_128_digest(text) != checksum:
            raise PackedFileError("its header is damaged")
        self.header: dict[str, Any] = json.loads(text)

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        os.close(self._descriptor)

    def map(self) -> mmap.mmap:
        """Return the file's memory, for reading, which all processes share."""
        return mmap.mmap(self._descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)

    def map_private(self, size: int) -> mmap.mmap:
        """Return the memory of the first bytes. It is shared too, but that pages become this process's own when they
        are written to."""
        return mmap.mmap(self._descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def verify(memory: mmap.mmap, payloads: Iterable[tuple[str, Payload]]) -> None:
    """Read payloads, given with their names. PackedFileError: one is damaged."""
    view = memoryview(memory)

    def check(named: tuple[str, Payload]) -> str | None:
        name, payload = named
        part = view[payload.offset : payload.offset + payload.size]
        return None if xxhash.xxh3_128_hexdigest(part) == payload.checksum else name

    # The longest first, so that no thread is left with one at the end.
    order = sorted(payloads, key=lambda named: -named[1].size)
    with ThreadPoolExecutor(get_num_threads()) as pool:
        damaged = [name for name in pool.map(check, order) if name is not None]
    if damaged:
        raise PackedFileError(f"{damaged[0]} is damaged")


def address_of(memory: mmap.mmap) -> tuple[int, object]:
    """Return where memory lies, and what keeps it."""
    owner = np.frombuffer(memory, dtype=np.uint8)
    return owner.ctypes.data, owner
