"""Traces in Mooncake's format: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length` (tokens)
and `hash_ids`, one for each 512 tokens of the prompt; prompts with equal ids from the start share those tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 512
_NUMBERS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """timestamp: seconds from the first request of the trace on."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Return the requests of a trace in order of time, the first `limit` lines of it.

    ValueError names the file and the line that cannot be used.
    """
    requests: list[TraceRequest] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(requests) == limit:
                break
            if line.strip():
                try:
                    requests.append(_request(json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} has no requests")
    requests.sort(key=lambda r: r.timestamp)
    first = requests[0].timestamp
    return [TraceRequest(r.timestamp - first, r.input_length, r.output_length, r.hash_ids) for r in requests]


def _request(record: Any) -> TraceRequest:
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in (*_NUMBERS, "hash_ids") if name not in record]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    for name in _NUMBERS:
        value, least = record[name], 0 if name == "timestamp" else 1
        whole = isinstance(value, int) or (name == "timestamp" and isinstance(value, float))
        if isinstance(value, bool) or not whole or not least <= value < 1 << 53:
            raise ValueError(f"{name} is {value!r}; it must be a number of {least} or more")
    ids, length = record["hash_ids"], record["input_length"]
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError("hash_ids must be a list of whole numbers of 0 or more")
    blocks = -(-length // BLOCK)
    if len(ids) != blocks:
        raise ValueError(f"there are {len(ids)} hash_ids; {length} tokens are {blocks} blocks of {BLOCK}")
    return TraceRequest(record["timestamp"] / 1e3, length, record["output_length"], tuple(ids))
