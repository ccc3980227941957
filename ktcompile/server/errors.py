"""What is answered where something is wrong: OpenAI's error object, with the status that its clients expect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

from ktcompile.engine.async_engine import SlowReaderError, UnavailableError
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}


class ApiError(Exception):
    """An answer that is an error. param: the parameter that is at fault. code: what programs look for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON."""
    content = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    return Response(content, status, headers, "application/json")


def unsupported(name: str, why: str = "") -> ApiError:
    """Return the error of a parameter that this server does not have."""
    message = f"Unsupported parameter: {name!r}{why and f' ({why})'}"
    return ApiError(400, message, param=name, code="unsupported_parameter")


def of_exception(error: Exception) -> ApiError:
    """Return what is said of an error of the engine's, or of a value that it does not take."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=wait)
    if isinstance(error, RequestTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, SlowReaderError):
        return ApiError(503, str(error), code="slow_reader")
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what is said of a body that is no JSON, names what is not there, or does not have its types."""
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}")
    if first["type"] == "extra_forbidden":
        return unsupported(place or "")
    return ApiError(422, f"{place or 'body'}: {first['msg']}", param=place, code=first["type"])
