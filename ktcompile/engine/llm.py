"""A model with its tokenizer that answers prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ktcompile.config import DeviceOptions
from ktcompile.engine.completion import Completion, with_texts
from ktcompile.engine.generate import CachedModel, end_tokens, token_limit
from ktcompile.engine.outputs import CompletionOutput, Logprobs, RequestOutput
from ktcompile.engine.sampler import prompt_logprobs, sample
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.models import hf_experts, placed
from ktcompile.models.load import load, locate
from ktcompile.models.packed_cache import AUTO
from ktcompile.models.tokenizer import load_tokenizer, token_ids
from ktcompile.runtime.metrics import ExpertMetrics
from ktcompile.runtime.placing import without_new_profile
from ktcompile.runtime.recording import Recording

# A text, {"prompt": text}, or {"prompt_token_ids": [...]}.
Prompt = str | Mapping[str, Any]


class LLM:
    """A model that is ready to answer.

    model: a directory or a hub id; None: the small model of the package. weight_format: of its experts. packed_cache:
    as for `ktcompile.load`.
    record_routing: a file for the trace of what its routers choose. device_options: fields of
    `ktcompile.config.DeviceOptions`; the file of routing_profile need not exist, and what routers choose is added to
    it. Both files are written at the end of each `generate`. Errors are those of `ktcompile.load`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        weight_format: str = "auto",
        packed_cache: str | Path | None = AUTO,
        record_routing: str | Path | None = None,
        **device_options: Any,
    ) -> None:
        options = DeviceOptions.of_keywords(device_options, "ktcompile.LLM")
        trace = None if record_routing is None else Path(record_routing)
        self._recording = Recording(trace, options.routing_profile)
        name = locate(model)
        self.tokenizer = load_tokenizer(name)
        others = without_new_profile(options).device_options()
        self.model = load(name, weight_format=weight_format, packed_cache=packed_cache, **others)
        self._recording.check(hf_experts.shape(self.model))
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Return the answer to each prompt, in order.

        prompts: one or several, each a text or {"prompt_token_ids": [...]}. sampling_params: for all, or one for each.
        ValueError: a prompt is none, or leaves no position for a token.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = _params_of_each(sampling_params, len(several))
        requests = [self._tokens_of(prompt) for prompt in several]
        for each in params:
            each.check_vocabulary(self._vocabulary)
        try:
            with self._recording.running():
                return [self._answers(*request, p) for request, p in zip(requests, params, strict=True)]
        finally:
            self._recording.save()

    def expert_metrics(self) -> ExpertMetrics:
        """Return where the model's experts are and what they did. ValueError: they are not on a device."""
        return placed.expert_metrics(self.model)

    @property
    def _vocabulary(self) -> int:
        return self.model.get_input_embeddings().get_parameter("weight").shape[0]

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the text of a prompt, if it has one, and its tokens."""
        text: object = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if isinstance(text, str):
            return text, token_ids(self.tokenizer, text)
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            raise ValueError(f"{prompt!r} is no prompt; give a text or {{'prompt_token_ids': [...]}}")
        size = self._vocabulary
        ids = [int(token) for token in ids]
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise ValueError(f"prompt_token_ids has {wrong[0]}; the model's tokens are 0 to {size - 1}")
        return None, ids

    def _answers(self, prompt: str | None, prompt_ids: list[int], params: SamplingParams) -> RequestOutput:
        """Return a prompt with its answers, one after the other."""
        limit, ends = token_limit(self.model, prompt_ids, params.max_tokens), end_tokens(self.model)
        answers: list[CompletionOutput] = []
        of_prompt: list[Logprobs | None] | None = None
        for index in range(params.n):
            completion = Completion(params, self.tokenizer, prompt_ids, ends, limit, index)
            run = CachedModel(self.model)
            logits = run(prompt_ids, all_logits=params.prompt_logprobs is not None)
            if params.prompt_logprobs is not None and of_prompt is None:
                of_prompt = self._prompt_logprobs(logits, prompt_ids, params.prompt_logprobs)
            while True:
                (sampled,) = sample(logits[-1:], [completion.state])
                completion.add(sampled)
                if completion.finish_reason is not None:
                    break
                logits = run([sampled.token_id])
            answers.append(completion.output())
        return RequestOutput(str(next(self._numbers)), prompt, prompt_ids, answers, True, prompt_logprobs=of_prompt)

    def _prompt_logprobs(self, logits: Tensor, prompt_ids: list[int], count: int) -> list[Logprobs | None]:
        found = prompt_logprobs(logits, prompt_ids, count)
        return [None if logprobs is None else with_texts(self.tokenizer, logprobs) for logprobs in found]


def _params_of_each(given: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * prompts
    if len(given) != prompts:
        raise ValueError(f"there are {len(given)} sampling_params for {prompts} prompts; give one, or one for each")
    return given
