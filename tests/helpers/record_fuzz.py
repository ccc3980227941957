"""What must hold of any bytes that are read as a record; for hypothesis, and for `tests/fuzz/record.py`."""

from __future__ import annotations

import numpy as np

from helpers.cache_blocks import LAYOUT, blocks
from ktcompile.cache import codec
from ktcompile.cache.record import Header, RecordError, checksum, parse, payload_of

_MOST = 1 << 20  # bytes of a payload that are decoded here


def good_record() -> bytes:
    """Return a record with planes."""
    raw = memoryview(np.arange(4000, dtype=np.float32).view(np.uint8))
    number, stored = codec.encode(raw, 4)
    header = Header(blocks(2)[1], LAYOUT, number, len(raw), len(stored), checksum(stored), checksum(raw))
    return header.pack() + bytes(stored)


def mutated(choice: bytes) -> bytes:
    """Return the record with some bytes changed: `choice` is triples of a place and a value."""
    record = bytearray(good_record())
    for i in range(0, len(choice) - 2, 3):
        record[int.from_bytes(choice[i : i + 2], "little") % len(record)] = choice[i + 2]
    return bytes(record)


def resealed(choice: bytes) -> bytes:
    """Return what `mutated` does, with the checksum that a header of this size would have."""
    record, size = bytearray(mutated(choice)), parse(good_record()).size
    record[size - 16 : size] = checksum(record[: size - 16])
    return bytes(record)


def sealed(number: int, raw_size: int, stored: bytes) -> bytes:
    """Return a record of any payload, all of whose checksums are right: what codec `number` is given to decode."""
    header = Header(blocks(2)[1], LAYOUT, number, raw_size, len(stored), checksum(stored), bytes(16))
    return header.pack() + stored


def check_any_bytes(data: bytes) -> None:
    """Read bytes as a record, as the disk tier does. AssertionError: what is taken is not what was written."""
    try:
        header = parse(data)
        assert parse(header.pack()) == header
        payload = payload_of(header, data)
        if header.raw_size <= _MOST:
            out = memoryview(bytearray(header.raw_size))
            codec.decode(header.codec, payload, out)
            if checksum(out) == header.raw_sum:
                assert header.record_size == len(data)
    except RecordError as error:
        assert error.reason
