"""How payloads are stored: as they are, or split into planes of bytes that zstd makes smaller, without loss.

Of floating-point numbers the bytes with the exponent are much alike and those of the mantissa are noise. A payload of
elements of `width` bytes is stored as `width` sizes (u32), then the planes: plane i has byte i of each element, as a
frame of zstd or, where that would not save an eighth, as it is.
"""

from __future__ import annotations

import struct
import sys

import numpy as np

from ktcompile.cache.record import RecordError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NONE = 0  # else the width of elements
WIDTHS = (1, 2, 4)
_LEVEL = 1
_WORTH_IT = 7 / 8
# Noise is recognised by so many bytes of the middle, and costs no more than that.
_PROBE = 8192


def encode(raw: memoryview, width: int) -> tuple[int, bytes | memoryview]:
    """Return the number of a codec and the payload that it makes, which is never larger than `raw`.

    width: bytes of an element, 1, 2 or 4; 0: as it is.
    """
    if width == NONE or len(raw) % width:
        return NONE, raw
    assert width in WIDTHS, f"no element has {width} bytes"
    elements = np.frombuffer(raw, np.uint8).reshape(-1, width)
    planes = [_smaller(np.ascontiguousarray(elements[:, i]).data) for i in range(width)]
    stored = struct.pack(f"<{width}I", *map(len, planes)) + b"".join(planes)
    return (width, stored) if len(stored) <= _WORTH_IT * len(raw) else (NONE, raw)


def decode(codec: int, stored: memoryview, out: memoryview) -> None:
    """Write the payload that was stored to `out`, which has its size. RecordError: it is none of that size."""
    if codec == NONE:
        if len(stored) != len(out):
            raise RecordError("codec", f"its payload has {len(stored)} bytes of {len(out)}")
        out[:] = stored
        return
    if codec not in WIDTHS or len(out) % codec or len(stored) < 4 * codec:
        raise RecordError("codec", f"its codec is {codec}, with {len(stored)} bytes for {len(out)}")
    sizes = struct.unpack_from(f"<{codec}I", stored)
    if sum(sizes) != len(stored) - 4 * codec:
        raise RecordError("codec", f"its planes have {sum(sizes)} bytes of {len(stored) - 4 * codec}")
    elements = np.frombuffer(out, np.uint8).reshape(-1, codec)
    begin = 4 * codec
    for i, size in enumerate(sizes):
        elements[:, i] = np.frombuffer(_whole(stored[begin : begin + size], len(elements)), np.uint8)
        begin += size


def _smaller(plane: memoryview) -> bytes | memoryview:
    middle = max(0, len(plane) - _PROBE) // 2
    sample = plane[middle : middle + _PROBE]
    if len(zstd.compress(sample, _LEVEL)) > _WORTH_IT * len(sample):
        return plane
    frame = zstd.compress(plane, _LEVEL)
    return frame if len(frame) <= _WORTH_IT * len(plane) else plane


def _whole(stored: memoryview, size: int) -> bytes | memoryview:
    """Return the bytes of a plane, never more than `size`. RecordError: there are not so many, or more."""
    if len(stored) == size:  # no frame is as long
        return stored
    decompressor = zstd.ZstdDecompressor()
    try:
        plane = decompressor.decompress(stored, max_length=size)
    except zstd.ZstdError as error:
        raise RecordError("codec", f"a plane is none: {error}") from error
    if len(plane) != size or not decompressor.eof or decompressor.unused_data:
        raise RecordError("codec", f"a plane has {len(plane)} bytes of {size}, or more")
    return plane
