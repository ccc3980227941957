"""A model with its tokenizer that answers prompts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.engine.alone import answer_alone
from ktcompile.engine.collected import Collected
from ktcompile.engine.engine import Engine
from ktcompile.engine.namespace import weights_of
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.outputs import RequestOutput
from ktcompile.engine.probe import UnsupportedModelError
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.summary import ModelSummary
from ktcompile.log import logger
from ktcompile.models import hf_experts, placed
from ktcompile.models.load import load, locate
from ktcompile.models.packed_cache import AUTO
from ktcompile.models.tokenizer import load_tokenizer, token_ids
from ktcompile.runtime.metrics import ExpertMetrics
from ktcompile.runtime.placing import without_new_profile
from ktcompile.runtime.recording import Recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

# A text, {"prompt": text}, or {"prompt_token_ids": [...]}.
Prompt = str | Mapping[str, Any]
_Tokens = tuple[str | None, list[int]]  # the text of a prompt, if it has one, and its tokens

# All prompts of a call wait at once.
_UNBOUNDED = {"max_queued_requests": sys.maxsize, "max_queued_tokens": sys.maxsize, "max_queue_seconds": 0.0}


class LLM:
    """A model that is ready to answer.

    model: a directory or a hub id; None: the small model of the package. packed_cache: as for `ktcompile.load`.
    record_routing: a file for the trace of what its routers choose. options: fields of
    `ktcompile.engine.options.EngineOptions`, as weight_format, max_num_seqs, kv_format and device; the file of
    routing_profile need not exist, and what routers choose is added to it. Both files are written at the end of each
    `generate`, whose prompts are then computed one after the other. So are they where the engine cannot run the model.
    `model` serves its engine: its weights are packed, and plain calls of it read NaN. It is None where the engine goes
    on with the step that an earlier start kept in the cache. Errors are those of `ktcompile.load`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        packed_cache: str | Path | None = AUTO,
        record_routing: str | Path | None = None,
        **options: Any,
    ) -> None:
        given = EngineOptions.of_keywords({**_UNBOUNDED, **options}, "ktcompile.LLM")
        trace = None if record_routing is None else Path(record_routing)
        self._recording = Recording(trace, given.routing_profile)
        if trace is not None or given.routing_profile is not None:
            given = replace(given, max_num_seqs=1)
        name = locate(model)
        self.tokenizer = load_tokenizer(name)
        self._numbers = itertools.count()
        self.model: PreTrainedModel | None = None
        # What is to be recorded only a model shows.
        self._engine = None if trace is not None else Engine.continued(name, self.tokenizer, given, packed_cache)
        if self._engine is not None:
            return
        device = without_new_profile(given).device_options()
        self.model = load(name, weight_format=given.weight_format, packed_cache=packed_cache, **device)
        self._recording.check(hf_experts.shape(self.model))
        try:
            weights = weights_of(name, given)
            self._engine = Engine.of_model(self.model, self.tokenizer, given, name=name, weights=weights)
        except UnsupportedModelError as error:
            logger.warning("prompts are computed one after the other: %s", error)
            return
        self._engine.keep(given, packed_cache)

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
                if self._engine is not None:
                    return self._answers(self._engine, requests, params)
                return [self._answer_alone(*request, p) for request, p in zip(requests, params, strict=True)]
        finally:
            self._recording.save()

    def close(self) -> None:
        """End what the engine has beside the model: keys and values that were not written to kv_disk_path yet are."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expert_metrics(self) -> ExpertMetrics:
        """Return where the model's experts are and what they did. ValueError: they are not on a device."""
        if self.model is None:
            raise ValueError("no expert of the model was given to a device")
        return placed.expert_metrics(self.model)

    @property
    def _vocabulary(self) -> int:
        if self._engine is not None:
            return self._engine.vocab_size
        return ModelSummary.of_model(self._alone).vocab_size

    @property
    def _alone(self) -> PreTrainedModel:
        """The model where there is no engine."""
        assert self.model is not None
        return self.model

    def _tokens_of(self, prompt: Prompt) -> _Tokens:
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

    def _answers(
        self, engine: Engine, requests: Sequence[_Tokens], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Return prompts with their answers, which are computed together."""
        collected: dict[str, Collected] = {}
        try:
            for (prompt, prompt_ids), each in zip(requests, params, strict=True):
                request_id = str(next(self._numbers))
                engine.add(request_id, prompt_ids, each, prompt=prompt)
                collected[request_id] = Collected(request_id, prompt, prompt_ids, each)
            while engine.has_requests:
                for delta in engine.step():
                    collected[delta.request_id].add(delta)
        finally:  # of a call that was interrupted nothing is left
            for request_id in collected:
                engine.abort(request_id)
            if engine.has_requests:
                engine.step()
        return [each.output() for each in collected.values()]

    def _answer_alone(self, prompt: str | None, prompt_ids: list[int], params: SamplingParams) -> RequestOutput:
        answers, of_prompt = answer_alone(self._alone, self.tokenizer, prompt_ids, params)
        return RequestOutput(str(next(self._numbers)), prompt, prompt_ids, answers, True, prompt_logprobs=of_prompt)


def _params_of_each(given: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * prompts
    if len(given) != prompts:
        raise ValueError(f"there are {len(given)} sampling_params for {prompts} prompts; give one, or one for each")
    return given
