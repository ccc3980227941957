"""Which blocks requests asked for, as JSON lines, to be replayed later: neither texts nor keys are written.

The first line is {"format": "ktcompile-blocks", "version": 1, "block_size": tokens, "block_bytes": bytes}, each other
one a request: {"time": seconds, "tokens": of its prompt, "tenant": "", "blocks": [...]}, with a name for each full
block in order. Names are hashes of keys under a secret that is forgotten: they are equal where blocks are, in one file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_FORMAT, _VERSION = "ktcompile-blocks", 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: when it came, the tokens of its prompt, whose it is, its full blocks from the first on."""

    time: float
    tokens: int
    blocks: tuple[Hashable, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """Requests in order of time. block_size: tokens of a block, which takes block_bytes."""

    block_size: int
    block_bytes: int
    requests: Sequence[Asked]

    def usable(self, request: Asked) -> tuple[Hashable, ...]:
        """Return the blocks of a request that can be hits: one token at least is always computed."""
        return request.blocks[: (request.tokens - 1) // self.block_size]


class Recorder:
    """Writes requests into an open text file as they come."""

    def __init__(self, file: TextIO, block_size: int, block_bytes: int) -> None:
        self._file, self._secret = file, secrets.token_bytes(32)
        self._write({"format": _FORMAT, "version": _VERSION, "block_size": block_size, "block_bytes": block_bytes})

    def record(self, time: float, tokens: int, keys: Iterable[bytes], tenant: str = "") -> None:
        """Write a request with the keys of its full blocks."""
        self._write(
            {"time": time, "tokens": tokens, "tenant": self._name(tenant.encode()) if tenant else ""}
            | {"blocks": [self._name(key) for key in keys]}
        )

    def _name(self, text: bytes) -> str:
        return hashlib.blake2b(text, key=self._secret, digest_size=8).hexdigest()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def is_recording(path: Path) -> bool:
    """Return whether a file begins as a recording does."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return f'"{_FORMAT}"' in lines.readline(200)


def read(path: Path) -> Recording:
    """Return what a recorder wrote. ValueError names the file and the line that cannot be used."""
    sizes: dict[str, int] = {}
    requests: list[Asked] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    if (record["format"], record["version"]) != (_FORMAT, _VERSION):
                        raise ValueError("it is not a recording of blocks, or of another version")
                    sizes = {name: _whole(record[name]) for name in ("block_size", "block_bytes")}
                else:
                    requests.append(_asked(record, sizes["block_size"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} has no requests")
    requests.sort(key=lambda request: request.time)
    return Recording(**sizes, requests=requests)


def _asked(record: Any, block_size: int) -> Asked:
    blocks = tuple(str(name) for name in record["blocks"])
    asked = Asked(float(record["time"]), _whole(record["tokens"]), blocks, str(record.get("tenant", "")))
    if len(blocks) > asked.tokens // block_size or len(set(blocks)) < len(blocks):
        raise ValueError(f"{len(blocks)} blocks, each of its own, cannot be of {asked.tokens} tokens")
    return asked


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 53:
        raise ValueError(f"{value!r} must be a whole number above 0")
    return value
