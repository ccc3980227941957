"""The generation loop for one sequence: prefill, then one token at a time."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen.

    temperature: 0 takes the most likely token. top_p: only the most likely tokens that together have this
    probability are drawn from. seed: None draws a new one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    forward: Callable[..., Any] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt_ids`, the end-of-sequence token not among them.

    It ends there, after max_tokens, or where the model's positions end. forward: what runs the model, a
    compiled `model.forward` for example; None is `model` itself. The first token comes after the prefill.
    ValueError: no prompt, max_tokens below 1, or a prompt that leaves no position for a token.
    """
    ends = end_tokens(model)
    return itertools.takewhile(
        lambda token: token not in ends, generate_to_end(model, prompt_ids, max_tokens, sampling, forward)
    )


def generate_to_end(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    forward: Callable[..., Any] | None = None,
) -> Iterator[int]:
    """Yield what `generate` does, and after that the end-of-sequence token if it came to one."""
    limit = _token_limit(model, prompt_ids, max_tokens)
    choose = Sampler(sampling or Sampling())
    return _tokens(model, list(prompt_ids), limit, choose, forward or model)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens with which a model ends a sequence."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else model.config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


class Sampler:
    """Chooses tokens from logits; two of the same seed choose alike."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Return the number of a token. logits: [vocabulary]."""
        if self._sampling.temperature == 0:
            return int(logits.argmax().item())
        # The most likely token stays finite however small the temperature is.
        logits = (logits.double() - logits.max()) / self._sampling.temperature
        probabilities, tokens = logits.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self._sampling.top_p, 0)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(tokens[drawn].item())


def _tokens(
    model: PreTrainedModel, prompt_ids: list[int], limit: int, choose: Sampler, forward: Callable[..., Any]
) -> Iterator[int]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    # Most models can leave out the logits of all positions but the last.
    takes_part = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept: dict[str, int] = {"logits_to_keep": 1} if takes_part else {}
    ends = end_tokens(model)
    new_ids = prompt_ids
    for _ in range(limit):
        ids = torch.tensor([new_ids], device=model.device)
        token = choose(_last_logits(forward, ids, cache, kept))
        yield token
        if token in ends:
            return
        new_ids = [token]


# Not around the loop: a generator would leave its caller without gradients between two tokens.
@torch.no_grad()
def _last_logits(forward: Callable[..., Any], ids: torch.Tensor, cache: object, kept: dict[str, int]) -> torch.Tensor:
    result = forward(input_ids=ids, past_key_values=cache, use_cache=True, **kept)
    logits: torch.Tensor = result.logits[0, -1].cpu()
    return logits


def _token_limit(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int) -> int:
    """Return how many tokens may be generated."""
    if not prompt_ids:
        raise ValueError("the prompt has no tokens")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
    positions = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is None:
        return max_tokens
    if len(prompt_ids) >= positions:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; the model has {positions} positions")
    return min(max_tokens, int(positions) - len(prompt_ids))
