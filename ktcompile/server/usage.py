"""What an answer took in tokens, and what that costs where prices are known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktcompile.engine.receipt import Receipt
    from ktcompile.server.protocol import StreamOptions

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a million tokens of each kind, in any one currency. cached: of prompts whose keys and values were there."""

    prompt: float
    cached: float
    completion: float

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Return what a request costs. cached_tokens: those among the prompt's."""
        computed = prompt_tokens - cached_tokens
        total = computed * self.prompt + cached_tokens * self.cached + completion_tokens * self.completion
        return total / _MILLION


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far. cached: those of its prompts that were not computed. reasoning: those of its answers
    that are no content. prices: None where nobody asks what it costs. receipt: where the prompt's keys and values came
    from; None where nobody asks."""

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    prices: Prices | None = None
    receipt: Receipt | None = None

    def for_chat(self) -> dict[str, Any]:
        """Return the record of chats and completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
            **self._cost(),
            **({} if self.receipt is None else {"cache_receipt": asdict(self.receipt)}),
        }

    def for_event(self, options: StreamOptions) -> dict[str, Any]:
        """Return what an event of a stream says of it, the last excepted."""
        if not options.include_usage:
            return {}
        return {"usage": self.for_chat() if options.continuous_usage_stats else None}

    def for_responses(self) -> dict[str, Any]:
        """Return the record of the Responses API."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.completion,
            **self._cost(),
        }

    def _cost(self) -> dict[str, float]:
        return {} if self.prices is None else {"cost": self.prices.cost(self.prompt, self.cached, self.completion)}
