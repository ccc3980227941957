"""Traces as recordings of blocks, which is what is replayed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

from ktcompile.bench.serve import trace
from ktcompile.bench.serve.trace import BLOCK, TraceRequest
from ktcompile.cache import recording
from ktcompile.cache.recording import Asked, Recording


def of_requests(requests: Sequence[TraceRequest], bytes_per_token: int) -> Recording:
    """Return requests of Mooncake's format with their full blocks; what is behind these cannot be found by others."""
    asked = [Asked(r.timestamp, r.input_length, r.hash_ids[: r.input_length // BLOCK]) for r in requests]
    return Recording(BLOCK, BLOCK * bytes_per_token, asked)


def read(path: Path, bytes_per_token: int, limit: int | None = None) -> Recording:
    """Return a file of Mooncake's format or of ours. ValueError: it cannot be used."""
    if not recording.is_recording(path):
        found = of_requests(trace.read(path, limit), bytes_per_token)
    else:
        whole = recording.read(path)
        found = Recording(whole.block_size, whole.block_bytes, whole.requests[:limit])
    _check(found, path)
    return found


def footprint(found: Recording) -> int:
    """Return the bytes of all distinct blocks."""
    return found.block_bytes * len({block for request in found.requests for block in request.blocks})


def _check(found: Recording, path: Path) -> None:
    """Raise ValueError where a block follows on different ones: its name would not stand for all that is before it."""
    parents: dict[Hashable, Hashable | None] = {}
    for request in found.requests:
        before: Hashable | None = None
        for block in request.blocks:
            if parents.setdefault(block, before) != before:
                raise ValueError(f"{path}: block {block!r} follows on different ones; it must stand for a whole prefix")
            before = block
