"""What may be set of the server."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.server.reasoning import PARSERS
from ktcompile.server.usage import Prices

_PRICES = ("prompt_price", "cached_price", "completion_price")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How the server listens and what it allows.

    api_key: what requests must carry as a bearer; None: nothing. served_model_name: the model's name for clients; None:
    the last part of its path, or its id. max_body_bytes: of a request. body_timeout: seconds until it must be here.
    request_timeout: seconds that a request may take; one may ask for less; None: no limit. max_unread: parts of an
    answer that a slow reader may leave. write_timeout: seconds in which it must take something. drain_timeout: seconds
    that requests have to end after SIGTERM. max_connections: at a time. max_logprobs, max_n: what a request may ask
    for. metrics_prefix: of the names of metrics. log_prompts: the log has what is asked. trace: spans of OpenTelemetry
    are made, for the provider of the process. reasoning_parser: of `ktcompile.server.reasoning.PARSERS`.
    cache_receipts: usage of chats says from which tier the prompt's keys and values came, and what that saved.
    prompt_price, cached_price, completion_price: of a million tokens; with one of them usage and spans have what a
    request costs,
    a cached token as much as another of the prompt where it has no price; None: 0.

    ValueError: a value is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    request_timeout: float | None = 600.0
    max_unread: int = 1024
    write_timeout: float = 60.0
    drain_timeout: float = 60.0
    max_connections: int = 1024
    max_logprobs: int = 20
    max_n: int = 16
    metrics_prefix: str = "vllm:"
    log_prompts: bool = False
    trace: bool = False
    reasoning_parser: str = "auto"
    cache_receipts: bool = False
    prompt_price: float | None = None
    cached_price: float | None = None
    completion_price: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; it must be 0 to 65535, where 0 takes a free one")
        for name in ("max_body_bytes", "max_unread", "max_connections", "max_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("body_timeout", "request_timeout", "write_timeout", "drain_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0 seconds")
        for name in _PRICES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        if self.reasoning_parser not in PARSERS:
            raise ValueError(f"reasoning_parser is {self.reasoning_parser!r}; it must be one of {', '.join(PARSERS)}")
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs is {self.max_logprobs}; it must be 0 or more")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; leave it out for a server that asks for none")

    @property
    def prices(self) -> Prices | None:
        """What tokens cost; None: nobody asks."""
        if all(getattr(self, name) is None for name in _PRICES):
            return None
        prompt = self.prompt_price or 0.0
        cached = prompt if self.cached_price is None else self.cached_price
        return Prices(prompt, cached, self.completion_price or 0.0)
