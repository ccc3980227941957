"""The record of one block on disk: a header that says everything of the block, then its payload.

Header, little-endian: magic, version, codec, length of the header; key, parent, namespace; position, number of tokens,
bytes of the layout's text; sizes of the payload raw and stored; xxh3_128 of the payload stored and raw; then the token
ids (u32), the text, and the xxh3_128 of all of this. A parser of bytes that anyone may have written: no length
is believed before it was compared with the bytes that are there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from ktcompile.cache.block_id import BlockId

VERSION = 1
_MAGIC = b"KTKVBLK\n"
_FRONT = struct.Struct("<8sHHI32s32s32sQIIQQ16s16s")
_CHECKSUM = 16
_MOST_TOKENS = 1 << 16
_LONGEST_LAYOUT = 1 << 16
# The longest header that there can be.
MOST_HEADER_BYTES = _FRONT.size + 4 * _MOST_TOKENS + _LONGEST_LAYOUT + _CHECKSUM


class RecordError(ValueError):
    """A record cannot be used. reason: one word for counters."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself.

    layout: how the raw payload is laid out, in words that are compared whole. codec: a number of `cache.codec`.
    raw_size, stored_size: bytes of the payload before and after that. stored_sum, raw_sum: their xxh3_128.
    """

    block: BlockId
    layout: str
    codec: int
    raw_size: int
    stored_size: int
    stored_sum: bytes
    raw_sum: bytes

    @property
    def size(self) -> int:
        """Bytes of the header."""
        return _size(len(self.block.token_ids), len(self.layout.encode()))

    @property
    def record_size(self) -> int:
        """Bytes of the whole record."""
        return self.size + self.stored_size

    def pack(self) -> bytes:
        """Return the header's bytes. ValueError: a number is out of its range."""
        block, text = self.block, self.layout.encode()
        if len(block.token_ids) > _MOST_TOKENS or len(text) > _LONGEST_LAYOUT:
            raise ValueError(
                f"{len(block.token_ids)} tokens and a layout of {len(text)} bytes are too many for a record"
            )
        try:
            tokens = struct.pack(f"<{len(block.token_ids)}I", *block.token_ids)
            front = _FRONT.pack(
                _MAGIC,
                VERSION,
                self.codec,
                self.size,
                block.key,
                block.parent,
                block.namespace,
                block.position,
                len(block.token_ids),
                len(text),
                self.raw_size,
                self.stored_size,
                self.stored_sum,
                self.raw_sum,
            )
        except struct.error as error:
            raise ValueError(f"a number of {block.key.hex()} is out of its range: {error}") from error
        body = front + tokens + text
        return body + xxhash.xxh3_128_digest(body)


def parse(data: bytes | memoryview) -> Header:
    """Return the header that `data` begins with, which may have any bytes behind it. RecordError."""
    view = memoryview(data)
    if len(view) < _FRONT.size:
        raise RecordError("short", f"{len(view)} bytes are fewer than a header has")
    magic, version, codec, size, key, parent, namespace, position, tokens, text_size, raw, stored, *sums = (
        _FRONT.unpack_from(view)
    )
    if magic != _MAGIC:
        raise RecordError("magic", "it does not begin as a record")
    if version != VERSION:
        raise RecordError("version", f"it has version {version} of the format, this is {VERSION}")
    if not 0 < tokens <= _MOST_TOKENS or text_size > _LONGEST_LAYOUT or size != _size(tokens, text_size):
        raise RecordError("lengths", f"its header has {size} bytes for {tokens} tokens and {text_size} of a layout")
    if len(view) < size:
        raise RecordError("short", f"its header has {len(view)} bytes of {size}")
    if xxhash.xxh3_128_digest(view[: size - _CHECKSUM]) != bytes(view[size - _CHECKSUM : size]):
        raise RecordError("header", "its header is damaged")
    token_ids = struct.unpack_from(f"<{tokens}I", view, _FRONT.size)
    try:
        layout = bytes(view[_FRONT.size + 4 * tokens : size - _CHECKSUM]).decode()
    except UnicodeDecodeError as error:
        raise RecordError("header", "its layout is no text") from error
    return Header(BlockId(key, parent, namespace, position, token_ids), layout, codec, raw, stored, *sums)


def payload_of(header: Header, record: bytes | memoryview) -> memoryview:
    """Return the stored payload of a whole record, once its checksum was compared. RecordError."""
    view = memoryview(record)
    if len(view) != header.record_size:
        raise RecordError("short" if len(view) < header.record_size else "long", f"it has {len(view)} bytes")
    payload = view[header.size :]
    if xxhash.xxh3_128_digest(payload) != header.stored_sum:
        raise RecordError("payload", "its payload is damaged")
    return payload


def check_is(header: Header, wanted: BlockId, layout: str, raw_size: int) -> None:
    """RecordError: a record is not of the block that was asked for, or of another layout."""
    if header.block != wanted:
        fields = ("key", "parent", "namespace", "position", "token_ids")
        name = next(name for name in fields if getattr(header.block, name) != getattr(wanted, name))
        raise RecordError("other", f"it has another {name} than was asked for")
    if header.layout != layout or header.raw_size != raw_size:
        raise RecordError("layout", f"it has {header.raw_size} bytes as {header.layout!r}")


def checksum(payload: bytes | memoryview | bytearray) -> bytes:
    """Return the xxh3_128 of a payload, 16 bytes."""
    return xxhash.xxh3_128_digest(payload)


def _size(tokens: int, text_size: int) -> int:
    return _FRONT.size + 4 * tokens + text_size + _CHECKSUM
