"""What the page at / shows: one JSON object, `GET /status`, which the page asks for once a second.

The page itself is `static/index.html`, one file without anything from elsewhere. It computes rates from the totals, and
leaves out what is None or missing, so that a server may know less than all of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of a latency over the last requests or tokens, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency | None:
        """Return the percentiles; None where there are no values."""
        return cls(*(float(v) for v in np.percentile(seconds, (50, 90, 99)))) if seconds else None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model. Fields: as of `Status`."""

    weight_format: str | None = None
    block_size: int | None = None
    expert_counts: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """A server now.

    state: "ready", "loading", "draining" or "failed". isa: the instruction set of the kernels. weight_format: of the
    experts. uptime_seconds: since it was ready. requests_running, requests_waiting: now. requests_finished,
    requests_rejected, prompt_tokens, generation_tokens, preemptions: totals since the start. kv_usage: the share of
    the blocks of keys and values that is held, 0 to 1; kv_blocks: all of them; block_size: tokens of one. ttft, itl: to
    the first token and between tokens. expert_counts: tokens that each expert was given, a list for each MoE layer.
    """

    model: str | None = None
    version: str | None = None
    state: Literal["ready", "loading", "draining", "failed"] | None = None
    isa: str | None = None
    threads: int | None = None
    weight_format: str | None = None
    uptime_seconds: float | None = None
    requests_running: int | None = None
    requests_waiting: int | None = None
    requests_finished: int | None = None
    requests_rejected: int | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    kv_usage: float | None = None
    kv_blocks: int | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    ttft: Latency | None = None
    itl: Latency | None = None
    expert_counts: Sequence[Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the page reads; what is not known is None."""
        return asdict(self)


def page() -> str:
    """Return the page, which is HTML in UTF-8."""
    return files("ktcompile.server").joinpath("static", "index.html").read_text(encoding="utf-8")
