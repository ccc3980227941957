"""What a server answers while its model is made ready: that it starts, and what happens."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ktcompile.server.errors import ApiError, json_response

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Starting:
    """An application for the time until there is another. phase: what happens, in words."""

    def __init__(self) -> None:
        self.phase = "loading"
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=_METHODS)])

    async def _answer(self, request: Request) -> Response:
        if request.url.path in ("/health", "/ready"):
            return json_response({"status": "starting", "phase": self.phase}, 503)
        return ApiError(503, f"the server starts: {self.phase}", headers={"Retry-After": "5"}).response()
