"""What `ktc generate` made, and what it says of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktcompile.runtime.metrics import ExpertMetrics


@dataclass(slots=True)
class Outcome:
    """What was generated, and how long each part took, in seconds.

    prefill_seconds: until the first token. decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    interrupted: bool = False

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second; None if the prompt was not finished."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first one; None if there are none."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else None


def record(
    args: argparse.Namespace,
    model: str,
    outcome: Outcome,
    reports: Sequence[dict[str, object]],
    metrics: ExpertMetrics | None,
) -> dict[str, object]:
    """Return what JSON has of a run."""
    from ktcompile import get_num_threads
    from ktcompile.machine import machine

    return {
        "prompt": args.prompt,
        "text": "".join(outcome.pieces),
        "prompt_tokens": outcome.prompt_tokens,
        "generated_tokens": outcome.tokens,
        "interrupted": outcome.interrupted,
        "load_seconds": outcome.load_seconds,
        "prefill_seconds": outcome.prefill_seconds,
        "prefill_tokens_per_second": outcome.prefill_rate,
        "decode_seconds": outcome.decode_seconds,
        "decode_tokens_per_second": outcome.decode_rate,
        "model": model,
        "isa": machine().isa,
        "threads": get_num_threads(),
        "weight_format": args.weight_format,
        "compiled": args.compile,
        "compile_reports": list(reports),
        "device": args.device,
        "experts": None if metrics is None else metrics.as_dict(),
    }


def speed_line(outcome: Outcome) -> str:
    """Return one line for people."""

    def rate(tokens: int, seconds: float, per_second: float | None) -> str:
        speed = "" if per_second is None else f" ({per_second:.1f} tokens/s)"
        return f"{tokens} tokens in {seconds:.2f} s{speed}"

    prefill = rate(outcome.prompt_tokens, outcome.prefill_seconds, outcome.prefill_rate)
    decode = rate(max(0, outcome.tokens - 1), outcome.decode_seconds, outcome.decode_rate)
    return f"load {outcome.load_seconds:.2f} s | prefill {prefill} | decode {decode}"
