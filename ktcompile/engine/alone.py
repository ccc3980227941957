"""Answers of models that the engine cannot run: one sequence at a time, with transformers' own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktcompile.engine.completion import Completion, with_texts
from ktcompile.engine.generate import CachedModel, end_tokens, token_limit
from ktcompile.engine.outputs import CompletionOutput, Logprobs
from ktcompile.engine.sampler import prompt_logprobs, sample
from ktcompile.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_alone(
    model: PreTrainedModel, tokenizer: Any, prompt_ids: list[int], params: SamplingParams
) -> tuple[list[CompletionOutput], list[Logprobs | None] | None]:
    """Return the answers to a prompt, one computed after the other, and what is asked for of the prompt's tokens.

    ValueError: no prompt, or no position is left. NotFiniteError: logits are not finite.
    """
    limit, ends = token_limit(model, prompt_ids, params.max_tokens), end_tokens(model)
    answers: list[CompletionOutput] = []
    of_prompt: list[Logprobs | None] | None = None
    for index in range(params.n):
        completion = Completion(params, tokenizer, prompt_ids, ends, limit, index)
        run = CachedModel(model)
        logits = run(prompt_ids, all_logits=params.prompt_logprobs is not None)
        if params.prompt_logprobs is not None and of_prompt is None:
            found = prompt_logprobs(logits, prompt_ids, params.prompt_logprobs)
            of_prompt = [None if logprobs is None else with_texts(tokenizer, logprobs) for logprobs in found]
        while True:
            (sampled,) = sample(logits[-1:], [completion.state])
            completion.add(sampled)
            if completion.finish_reason is not None:
                break
            logits = run([sampled.token_id])
        answers.append(completion.output())
    return answers, of_prompt
