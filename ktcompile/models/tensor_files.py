"""Files of safetensors: their headers, and their tensors read into memory of their own.

Nothing is mapped, so a file that changes or ends early is an error with a name and not a signal, and what was read
counts once.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH_BYTES = 8
# The format's own limit; a longer one is not a header.
_LONGEST_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a header describes it. dtype: its name in safetensors, as "BF16". size: in bytes. begin: the first
    of them, after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    begin: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class TensorFile:
    """An open file of safetensors. tensors: by name."""

    def __init__(self, file: Path, *, keep_cached: bool = True) -> None:
        """Read the header. keep_cached: whether the system may keep in RAM what was read. Errors as for
        `read_header`; FileNotFoundError: there is no such file."""
        self.path = file
        self.tensors = {tensor.name: tensor for tensor in read_header(file)}
        self._keep_cached = keep_cached
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._data = _LENGTH_BYTES + struct.unpack("<Q", os.pread(self._descriptor, _LENGTH_BYTES, 0))[0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor. ValueError: torch has none of its name."""
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {stored}, which is not supported; only {', '.join(DTYPES)} are")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return a tensor. ValueError: the file ends within it, or as for `dtype`; OSError: it cannot be read."""
        result = torch.empty(self.tensors[name].shape, dtype=self.dtype(name))
        self.read_into(result, name, 0)
        return result

    def read_into(self, target: Tensor, name: str, first: int) -> None:
        """Fill `target`, which is contiguous, with elements of a tensor of its dtype, from the one numbered `first`.
        Errors as for `read`."""
        assert target.is_contiguous() and target.dtype == self.dtype(name)
        if not target.numel():
            return
        stored = self.tensors[name]
        begin = first * target.element_size()
        array: Any = target.view(-1).view(torch.uint8).numpy()
        memory = memoryview(array)
        assert begin + len(memory) <= stored.size
        self._fill(memory, self._data + stored.begin + begin, name)

    def _fill(self, memory: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(memory):
            try:
                got = os.preadv(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}, while {name} was read", str(self.path)) from error
            if got == 0:
                raise ValueError(f"{self.path} ends within {name}: it was cut short, or was not fully copied")
            done += got
        if not self._keep_cached:
            os.posix_fadvise(self._descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors file. ValueError: it is damaged or was not fully copied."""
    size, text = file.stat().st_size, header_text(file)
    try:
        entries = json.loads(text)
        tensors = tuple(
            stored_tensor(name, entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        )
        end = max((tensor.begin + tensor.size for tensor in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: its header is not one of safetensors ({error!r})") from error
    if _LENGTH_BYTES + len(text) + end > size:
        raise ValueError(f"{file} was not fully copied: {size} bytes of {_LENGTH_BYTES + len(text) + end}")
    return tensors


def header_text(file: Path) -> bytes:
    """Return the JSON at the beginning of a safetensors file. ValueError: there is none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else _LONGEST_HEADER + 1
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"{file} is damaged: it does not begin with a header of safetensors")
        return stream.read(length)


def stored_tensor(name: str, dtype: str, shape: Iterable[int], offsets: tuple[int, int]) -> StoredTensor:
    """Return an entry of a header. offsets: of its first byte and past its last, after the header."""
    return StoredTensor(name, dtype, tuple(shape), offsets[1] - offsets[0], offsets[0])
