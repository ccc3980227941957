"""The generation loop for one sequence: prefill, then one token at a time."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ktcompile.engine.sampler import SamplingState, sample
from ktcompile.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams | None = None,
    forward: Callable[..., Any] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt_ids`, the end-of-sequence token not among them.

    It ends there, after max_tokens, or where the model's positions end. sampling: how tokens are chosen, where None
    takes the likeliest; what it says of the end does not count. forward: what runs the model, a compiled
    `model.forward` for example; None is `model` itself. The first token comes after the prefill.
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
    sampling: SamplingParams | None = None,
    forward: Callable[..., Any] | None = None,
) -> Iterator[int]:
    """Yield what `generate` does, and after that the end-of-sequence token if it came to one."""
    limit = token_limit(model, prompt_ids, max_tokens)
    ends = end_tokens(model)
    state = SamplingState(sampling or SamplingParams(temperature=0.0), prompt_ids, ends)
    return _tokens(CachedModel(model, forward), list(prompt_ids), limit, state, ends)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens with which a model ends a sequence."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else model.config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


class CachedModel:
    """Runs a model on one sequence, whose keys and values it keeps. forward: as for `generate`."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any] | None = None) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=model.config)
        self._device = model.device
        self._forward = forward or model
        # Most models can leave out the logits of all positions but the last.
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        """Return the logits behind the last of some more tokens, [1, V], or behind each, [len(token_ids), V]."""
        kept = {"logits_to_keep": 1} if self._keeps_last and not all_logits else {}
        ids = torch.tensor([token_ids], device=self._device)
        result = self._forward(input_ids=ids, past_key_values=self._cache, use_cache=True, **kept)
        logits: Tensor = result.logits[0]
        return (logits if all_logits else logits[-1:]).cpu()


def _tokens(run: CachedModel, prompt_ids: list[int], limit: int, state: SamplingState, ends: set[int]) -> Iterator[int]:
    new_ids = prompt_ids
    for _ in range(limit):
        token = sample(run(new_ids), [state])[0].token_id
        state.add(token)
        yield token
        if token in ends:
            return
        new_ids = [token]


def token_limit(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int | None) -> int:
    """Return how many tokens may follow a prompt; max_tokens None: as many as there are positions for.

    ValueError: no prompt, max_tokens below 1, no position is left, or nothing ends the tokens.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no tokens")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
    positions = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is None:
        if max_tokens is None:
            raise ValueError("max_tokens is None, and the model has no last position; give a number")
        return max_tokens
    left = int(positions) - len(prompt_ids)
    if left < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; the model has {positions} positions")
    return left if max_tokens is None else min(max_tokens, left)
