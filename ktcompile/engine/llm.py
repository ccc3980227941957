"""A model with its tokenizer that answers prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ktcompile.config import DeviceOptions
from ktcompile.engine.detokenizer import IncrementalText
from ktcompile.engine.generate import end_tokens, generate_to_end
from ktcompile.engine.outputs import CompletionOutput, RequestOutput, SamplingParams
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
        try:
            with self._recording.running():
                return [self._answer(*request, p) for request, p in zip(requests, params, strict=True)]
        finally:
            self._recording.save()

    def expert_metrics(self) -> ExpertMetrics:
        """Return where the model's experts are and what they did. ValueError: they are not on a device."""
        return placed.expert_metrics(self.model)

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the text of a prompt, if it has one, and its tokens."""
        text: object = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if isinstance(text, str):
            return text, token_ids(self.tokenizer, text)
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            raise ValueError(f"{prompt!r} is no prompt; give a text or {{'prompt_token_ids': [...]}}")
        size = self.model.get_input_embeddings().get_parameter("weight").shape[0]
        ids = [int(token) for token in ids]
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise ValueError(f"prompt_token_ids has {wrong[0]}; the model's tokens are 0 to {size - 1}")
        return None, ids

    @torch.no_grad()
    def _answer(self, prompt: str | None, prompt_ids: list[int], params: SamplingParams) -> RequestOutput:
        tokens = generate_to_end(self.model, prompt_ids, params.max_tokens, params.sampling)
        text, ids, reason = _read(tokens, IncrementalText(self.tokenizer, prompt_ids), params, end_tokens(self.model))
        completion = CompletionOutput(0, text, ids, reason)
        return RequestOutput(str(next(self._numbers)), prompt, prompt_ids, [completion], finished=True)


def _params_of_each(given: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * prompts
    if len(given) != prompts:
        raise ValueError(f"there are {len(given)} sampling_params for {prompts} prompts; give one, or one for each")
    return given


def _read(
    tokens: Iterator[int], text: IncrementalText, params: SamplingParams, ends: set[int]
) -> tuple[str, list[int], str]:
    """Return the text, the tokens and why they ended."""
    written, ids = "", list[int]()
    for token in tokens:
        ids.append(token)
        if token in ends:
            return written + text.end(), ids, "stop"
        written += text.add(token)
        cut = _stop(written, params.stop_texts)
        if cut is not None:
            return written[:cut], ids, "stop"
    written += text.end()
    cut = _stop(written, params.stop_texts)
    return (written, ids, "length") if cut is None else (written[:cut], ids, "stop")


def _stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of some texts begins in `text`, None if none is in it."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
