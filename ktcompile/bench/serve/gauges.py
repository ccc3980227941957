"""What a server says of itself at /metrics, under the names that vLLM's has."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

import aiohttp

_LINE = re.compile(r"^(?:\w+:)?(\w+?)(?:\{[^}]*\})?\s+([0-9.eE+-]+)\s*$", re.MULTILINE)
_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Gauges:
    """Requests that run and that wait, and the share of the blocks of keys and values that is taken; None where it is
    not told."""

    running: float | None
    waiting: float | None
    kv_usage: float | None


async def read_gauges(session: aiohttp.ClientSession, url: str) -> Gauges | None:
    """Return a server's gauges; None where it has none."""
    try:
        async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=_SECONDS)) as response:
            return parse(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return None


def parse(text: str) -> Gauges:
    """Return the gauges in Prometheus' text, whatever prefix ended by a colon or "ktcompile_" they have."""
    found = {match[1].removeprefix("ktcompile_"): float(match[2]) for match in _LINE.finditer(text)}
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return Gauges(*(found.get(name) for name in names))
