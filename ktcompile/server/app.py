"""The application: endpoints, what they answer where something is wrong, and the gate in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from ktcompile import __version__
from ktcompile.engine.async_engine import Health
from ktcompile.engine.protocols import EngineLike
from ktcompile.runtime.metrics import ExpertMetrics
from ktcompile.server import chat, completions, responses
from ktcompile.server.errors import ApiError, json_response, of_validation
from ktcompile.server.metrics import CONTENT_TYPE
from ktcompile.server.middleware import Gate
from ktcompile.server.options import ServerOptions
from ktcompile.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from ktcompile.server.service import Service, api_errors
from ktcompile.server.sse import ClientLeft
from ktcompile.server.status import ModelFacts, page


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What is answered where something is wrong."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 422, 429, 500, 503, 504)
}


def create_app(
    engine: EngineLike,
    options: ServerOptions | None = None,
    *,
    defaults: dict[str, Any] | None = None,
    expert_metrics: Callable[[], ExpertMetrics | None] = lambda: None,
    facts: Callable[[], ModelFacts] = ModelFacts,
) -> FastAPI:
    """Return the application that serves an engine; its thread runs while the application does. Others: as of
    `ktcompile.server.service.Service`, which is `app.state.service`."""
    options = options or ServerOptions()
    service = Service(engine, options, defaults=defaults, expert_metrics=expert_metrics, facts=facts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(title="ktcompile", version=__version__, lifespan=lifespan, responses=_ERRORS)
    app.state.service = service
    app.add_middleware(Gate, options=options)
    _add_handlers(app, service)
    _add_generation(app, service)
    _add_others(app, service)
    return app


def _add_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def _of_api(_: Request, error: ApiError) -> Response:
        service.metrics.rejected(error.code or str(error.status))
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _of_body(_: Request, error: RequestValidationError) -> Response:
        found = of_validation(error.errors())
        service.metrics.rejected("invalid_request")
        return found.response()

    @app.exception_handler(HTTPException)
    async def _of_http(request: Request, error: HTTPException) -> Response:
        message = (
            f"there is no {request.method} {request.url.path}" if error.status_code in (404, 405) else error.detail
        )
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientLeft)
    async def _of_nobody(_: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def _of_mistake(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log has the reason", code="internal_error").response()


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await chat.respond(body, request, service)

    @app.post("/v1/completions")
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await completions.respond(body, request, service)

    @app.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer, as the Responses API does, in text."""
        return await responses.respond(body, request, service)


def _add_others(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "ktcompile",
        "max_model_len": service.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        """List the model."""
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """Describe the model."""
        service.check_model(name)
        return json_response(model)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a text, or of messages."""
        service.check_model(body.model)
        if (body.prompt is None) == (not body.messages):
            raise ApiError(400, "give prompt or messages", param="prompt")
        if body.messages:
            ids = (await service.prompts.of_messages(body.messages))[1]
        else:
            with api_errors():
                ids = await service.prompts.of_text(body.prompt or "", special=body.add_special_tokens)
        return json_response({"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens."""
        service.check_model(body.model)
        if any(token >= service.vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens has some that are not 0 to {service.vocab_size - 1}", param="tokens")
        return json_response({"prompt": await service.prompts.text_of(body.tokens)})

    @app.get("/health")
    async def health() -> Response:
        """Say whether the server works."""
        state = service.engine.health
        return json_response({"status": state.value}, 503 if state is Health.DEAD else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether it takes requests."""
        state = service.engine.health
        return json_response({"status": state.value}, 200 if state is Health.READY else 503)

    @app.get("/", include_in_schema=False)
    async def status_page() -> Response:
        """Return the page that shows what /status says."""
        return HTMLResponse(page())

    @app.get("/status")
    async def status() -> Response:
        """Say what the server does."""
        return json_response(service.status().to_json())

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        service.metrics.level(service.engine.stats)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)
