"""What every request passes: its id, its key, the size of its body, and a line in the log when it has been answered."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktcompile.log import logger
from ktcompile.server.errors import ApiError
from ktcompile.server.options import ServerOptions

# What is answered without a key: whether the server is there, and the page, which has no figures itself.
_OPEN = frozenset({"/", "/health", "/ready"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begin, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            try:
                self._check_key(scope["path"], headers)
                body = await self._body(headers, receive)
            except ApiError as error:
                await error.response()(scope, receive, send_with_id)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), send_with_id)
        finally:
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status or None,
                "seconds": round(time.monotonic() - begin, 4),
                "request_id": request_id,
            }
            logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._options.api_key
        if key is None or path in _OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not right:
            why = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body of a request, None if the client leaves before its end."""
        limit = self._options.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        try:
            return await asyncio.wait_for(_read(receive, limit), self._options.body_timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(
                408, f"the body was not here within {self._options.body_timeout:g} s", headers={"Connection": "close"}
            ) from None


async def _read(receive: Receive, limit: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read, and after it what there is."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
