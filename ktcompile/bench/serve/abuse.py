"""What clients do that a server must bear: they leave, read slowly, and send what is no request."""

from __future__ import annotations

import asyncio
import json
import socket
from urllib.parse import urlsplit

import aiohttp

# A slow reader's pace, and how little its kernel keeps for it.
_SLOW_PAUSE, _SLOW_BYTES, _SLOW_BUFFER = 0.25, 128, 2048


def bad_bodies(good: bytes) -> tuple[bytes, ...]:
    """Return bodies that are no requests, made of one that is."""
    record = json.loads(good)
    return (
        good[: len(good) // 2],
        b"",
        b"\xff\xfe" + good,
        b"[" * 20_000,
        json.dumps([record]).encode(),
        json.dumps(record | {"max_tokens": "many"}).encode(),
        json.dumps(record | {"max_tokens": -1}).encode(),
        json.dumps({name: value for name, value in record.items() if name not in ("prompt", "messages")}).encode(),
        json.dumps(record | ({"prompt": {}} if "prompt" in record else {"messages": {}})).encode(),
    )


async def leave(session: aiohttp.ClientSession, url: str, body: bytes, chunks: int) -> str:
    """Send a request, take so many pieces of its answer, and close the connection. Return what it came to: "left",
    "ended before", a HTTP status or "connection"."""
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                return str(response.status)
            try:
                for _ in range(chunks):
                    if not await response.content.readany():
                        return "ended before"
            finally:
                response.close()  # the connection too: what is not read is not waited for
            return "left"
    except (aiohttp.ClientError, OSError):
        return "connection"


async def read_slowly(url: str, headers: dict[str, str], body: bytes, seconds: float) -> str:
    """Send a request and read its answer slowly for some seconds. Return "read", "dropped" where the server gave it up,
    "left" where we did, a HTTP status or "connection". Plain HTTP alone."""
    parts = urlsplit(url)
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
    own.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(own, (parts.hostname or "", parts.port or 80))
        reader, writer = await asyncio.open_connection(sock=own, limit=_SLOW_BYTES)
    except OSError:
        own.close()
        return "connection"
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""])
    status = ""
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        end = loop.time() + seconds
        while loop.time() < end:
            piece = await asyncio.wait_for(reader.read(_SLOW_BYTES), max(0.01, end - loop.time()))
            status = status or piece[9:12].decode(errors="replace")
            if not piece:
                return {"200": "read", "": "connection"}.get(status, status)
            await asyncio.sleep(_SLOW_PAUSE)
        return "left"
    except asyncio.TimeoutError:
        return "left"
    except OSError:
        return "dropped"
    finally:
        writer.close()
